"""Which batch goes to which model worker, and what the death of one means. Pure: no clock, no system call.

`ModelQueue` holds what a batcher knows of one model version, `WorkerSeat` what it knows of one life of a model worker.
"""

from __future__ import annotations

import math
from typing import Protocol

from wsgi_ts.batcher.scheduler.counters import ModelCounters
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.job_queue import JobQueue, TicketQueue
from wsgi_ts.batcher.scheduler.policy import NONE, BatchPolicy, make_policy
from wsgi_ts.batcher.scheduler.sequences import SequenceQueue
from wsgi_ts.batcher.shm.layout import MAIL_PLACES
from wsgi_ts.messages import ModelSpec

#: A worker gets its next batch while one runs only where batches are this short (seconds): the hand-over matters
#: there, and a job that waits in a mailbox cannot be taken by a worker that falls idle (except by `revoke`).
PREFETCH_BELOW_S = 0.005
#: A batch that lies behind one running this many times longer than usual is taken back.
OVERDUE_FACTOR = 10.0
OVERDUE_LEAST_S = 0.05
#: Requests under way at a time in a worker whose handler is asynchronous; more wait in the queue. An engine behind such
#: a handler has a limit of its own: this one bounds what a worker's death costs.
ASYNC_LIMIT = 1024
_SMOOTHING = 0.1


class Mailbox(Protocol):
    """What dispatch needs of a mailbox (see `mailbox.BatcherMailbox`)."""

    posted: int

    @property
    def started(self) -> int:
        """Number of the last batch begun."""

    @property
    def done(self) -> int:
        """Number of the last batch finished."""

    @property
    def finished(self) -> int:
        """How many requests of a continuous batch have ended."""

    @property
    def ended(self) -> int:
        """How many sequences the handler has ended."""

    def post(self, entries: list[int]) -> int:
        """Hands over a batch."""

    def revoke(self, number: int) -> bool:
        """Takes a batch back."""


class Batch:
    """Jobs that were handed to a worker together.

    Of a continuous batch, this is what was handed over at once; `jobs` loses those that have ended.

    Args:
        number: the mailbox's number of it.
        jobs: the jobs.
        posted_at: when it was handed over (monotonic seconds).
        alone: whether the worker had nothing else to do.

    Attributes:
        revoked: whether the worker was told not to begin it.
    """

    __slots__ = ("alone", "jobs", "number", "posted_at", "revoked")

    def __init__(self, number: int, jobs: list[Job], posted_at: float, alone: bool) -> None:
        self.number = number
        self.jobs = jobs
        self.posted_at = posted_at
        self.alone = alone
        self.revoked = False

    @property
    def is_answered(self) -> bool:
        """True if every job has its answer; the worker reports the end of the batch a moment later."""
        return not any(job.is_with_worker for job in self.jobs)


class WorkerSeat:
    """One life of a model worker, as the dispatcher sees it."""

    def __init__(self, worker_id: int, start_count: int, model_index: int, mailbox: Mailbox) -> None:
        self.worker_id = worker_id
        self.start_count = start_count
        self.model_index = model_index
        self.mailbox = mailbox
        self.batches: list[Batch] = []
        self.leaving = False
        self.killed = False
        self.noted = 0  # the mailbox's `news` that the loop has looked at, of a continuous batch
        self.idle_since = 0.0

    @property
    def under_way(self) -> int:
        """Requests that the worker has."""
        return sum(len(batch.jobs) for batch in self.batches)

    @property
    def news(self) -> int:
        """Moves when the worker has taken over or ended requests of its continuous batch, or sequences."""
        return self.mailbox.done + self.mailbox.finished + self.mailbox.ended

    def __repr__(self) -> str:
        return f"<WorkerSeat {self.worker_id} batches {[batch.number for batch in self.batches]}>"


class ModelQueue:
    """Jobs, workers and batching rule of one model version on this batcher.

    Args:
        spec: the model version.
        counters: its words on the board.

    Attributes:
        sequences: the jobs by sequence, where the model has sequences; it is `jobs`, too.
        joins_steps: whether new jobs join those that are under way: a continuous batch, or an asynchronous handler.
    """

    def __init__(self, spec: ModelSpec, counters: ModelCounters) -> None:
        self.spec = spec
        self.counters = counters
        self.seats: list[WorkerSeat] = []
        # Each ticket is one worker's: what was let in together goes to as many workers.
        self.batch_size = 1 if spec.use_job_ticket else largest_batch(spec)
        self.joins_steps = spec.continuous_batching or spec.async_communication
        self.sequences: SequenceQueue | None = None
        if spec.sequence_batching:
            self.batch_size = largest_batch(spec)
            self.jobs: JobQueue = SequenceQueue(spec, lambda: self.workers)
            self.sequences = self.jobs
            self.policy: BatchPolicy = make_policy(NONE, 0.0)
        elif spec.use_job_ticket:
            self.jobs = TicketQueue(spec.job_queue_size, self.free_workers)
            # A request that was let in has a worker: there is nothing to wait for.
            self.policy = make_policy(NONE, 0.0)
        else:
            self.jobs = JobQueue(spec.job_queue_size)
            # A request joins a continuous batch at the next step: there is nothing to wait for, either.
            policy = NONE if self.joins_steps else spec.batch_policy
            self.policy = make_policy(policy, spec.max_batch_delay_ms / 1000)
        # Smoothed; starts where no batch is handed over early. Streams have no such time: they are never short.
        self.service_s = math.inf if self.joins_steps else PREFETCH_BELOW_S
        self.accepting = True
        self.closes_at = math.inf  # a version that is unregistered takes jobs until then
        self.held: list[WorkerSeat] = []  # asked to leave, kept for the jobs that such a version still has

    def idle_seat(self) -> WorkerSeat | None:
        """A worker with nothing to do."""
        for seat in self.seats:
            if not seat.batches and not seat.leaving:
                return seat
        return None

    def free_workers(self) -> int:
        """Workers with nothing to do, or about to say so: a client that has its answer may come back before that."""
        return sum(
            all(batch.is_answered for batch in seat.batches)
            for seat in self.seats
            if not seat.leaving and not seat.killed
        )

    def prefetch_seat(self) -> WorkerSeat | None:
        """A busy worker whose second mailbox place may take a full batch now."""
        if self.service_s >= PREFETCH_BELOW_S or len(self.jobs) < self.batch_size:
            return None
        for seat in self.seats:
            if len(seat.batches) == 1 and not seat.leaving and not seat.killed:
                return seat
        return None

    def join(self) -> tuple[WorkerSeat, int] | None:
        """The worker whose continuous batch has most room, and how many of the waiting jobs it is to get now."""
        roomy = [seat for seat in self.seats if self._room(seat) > 0]
        if not roomy:
            return None
        seat = max(roomy, key=self._room)
        share = -(-len(self.jobs) // len(roomy))
        return seat, min(share, self._room(seat))

    def take_sequences(self) -> tuple[WorkerSeat, list[Job]] | None:
        """The worker that has waited longest of those for which there are jobs of sequences, and these jobs."""
        if self.sequences is None:
            return None
        for seat in sorted(self.seats, key=_idle_since):
            idle = not seat.batches and not seat.leaving and not seat.killed
            room = self._room(seat) if self.joins_steps else self.batch_size if idle else 0
            taken = self.sequences.take_for(seat.worker_id, room) if room > 0 else []
            if taken:
                return seat, taken
        return None

    def _room(self, seat: WorkerSeat) -> int:
        """How many requests more a worker can take over for its continuous batch."""
        mailbox = seat.mailbox
        if seat.leaving or seat.killed or mailbox.posted - mailbox.done >= MAIL_PLACES:
            return 0
        return self.batch_size - seat.under_way

    def note_service(self, seconds: float) -> None:
        """Learns from a finished batch how long batches take."""
        self.service_s += _SMOOTHING * (seconds - self.service_s)

    def oldest_in_time_ns(self, now: float) -> int:
        """Requests that arrived before this monotonic time (ns) have passed the model's clientTimeoutInMills."""
        limit_ms = self.spec.client_timeout_ms
        return int(now * 1e9) - limit_ms * 1_000_000 if limit_ms else 0

    def overdue_after(self) -> float:
        """Seconds after which a running batch counts as unusually long."""
        return max(OVERDUE_LEAST_S, OVERDUE_FACTOR * self.service_s)

    @property
    def outstanding(self) -> int:
        """Jobs queued or handed to workers."""
        return len(self.jobs) + sum(len(batch.jobs) for seat in self.seats for batch in seat.batches)

    @property
    def workers(self) -> int:
        """Workers that take jobs."""
        return sum(1 for seat in self.seats if not seat.leaving)


def largest_batch(spec: ModelSpec) -> int:
    """Requests that a worker has at most, what its mailbox must hold; streamed sequences double it."""
    if spec.async_communication:
        return ASYNC_LIMIT
    doubled = spec.sequence_batching and spec.continuous_batching
    return max(1, spec.batch_size) * (2 if doubled else 1)


def _idle_since(seat: WorkerSeat) -> float:
    return seat.idle_since
