"""Which batch goes to which model worker, and what the death of one means. Pure: no clock, no system call.

`ModelQueue` holds what a batcher knows of one model version, `WorkerSeat` what it knows of one life of a model worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from wsgi_ts.batcher.counters import ModelCounters
from wsgi_ts.batcher.job_queue import JobQueue, TicketQueue
from wsgi_ts.batcher.policy import NONE, BatchPolicy, make_policy
from wsgi_ts.messages import ModelSpec

#: A worker gets its next batch while one runs only where batches are this short (seconds): the hand-over matters
#: there, and a job that waits in a mailbox cannot be taken by a worker that falls idle (except by `revoke`).
PREFETCH_BELOW_S = 0.005
#: A batch that lies behind one running this many times longer than usual is taken back.
OVERDUE_FACTOR = 10.0
OVERDUE_LEAST_S = 0.05
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

    def post(self, entries: list[int]) -> int:
        """Hands over a batch."""

    def revoke(self, number: int) -> bool:
        """Takes a batch back."""


class Batch:
    """Jobs that were handed to a worker together.

    `answered` is True once all of them were seen to have their answers, which is before the worker reports the end.

    Args:
        number: the mailbox's number of it.
        jobs: the jobs.
        posted_at: when it was handed over (monotonic seconds).
        arrivals_ns: when each of the jobs arrived.
        named_ns: the same of those that named the model's version.
        alone: whether the worker had nothing else to do.
    """

    __slots__ = ("alone", "answered", "arrivals_ns", "jobs", "named_ns", "number", "posted_at", "revoked")

    def __init__(
        self,
        number: int,
        jobs: list[int],
        posted_at: float,
        arrivals_ns: list[int],
        named_ns: list[int],
        alone: bool,
    ) -> None:
        self.number = number
        self.jobs = jobs
        self.posted_at = posted_at
        self.arrivals_ns = arrivals_ns
        self.named_ns = named_ns
        self.alone = alone
        self.revoked = False
        self.answered = False


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

    def __repr__(self) -> str:
        return f"<WorkerSeat {self.worker_id} batches {[batch.number for batch in self.batches]}>"


class ModelQueue:
    """Jobs, workers and batching rule of one model version on this batcher.

    Args:
        spec: the model version.
        counters: its words on the board.
        is_answered: whether all jobs of a batch have their answers; asked for models with job tickets only.
    """

    def __init__(
        self, spec: ModelSpec, counters: ModelCounters, is_answered: Callable[[Batch], bool] = lambda batch: False
    ) -> None:
        self.spec = spec
        self.counters = counters
        self.seats: list[WorkerSeat] = []
        self._is_answered = is_answered
        # Each ticket is one worker's: what was let in together goes to as many workers.
        self.batch_size = 1 if spec.use_job_ticket else spec.batch_size
        if spec.use_job_ticket:
            self.jobs: JobQueue = TicketQueue(spec.job_queue_size, self.free_workers)
            # A request that was let in has a worker: there is nothing to wait for.
            self.policy: BatchPolicy = make_policy(NONE, 0.0)
        else:
            self.jobs = JobQueue(spec.job_queue_size)
            self.policy = make_policy(spec.batch_policy, spec.max_batch_delay_ms / 1000)
        self.service_s = PREFETCH_BELOW_S  # smoothed; starts where no batch is handed over early
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
        free = 0
        for seat in self.seats:
            if seat.leaving or seat.killed:
                continue
            for batch in seat.batches:
                batch.answered = batch.answered or self._is_answered(batch)
            free += all(batch.answered for batch in seat.batches)
        return free

    def prefetch_seat(self) -> WorkerSeat | None:
        """A busy worker whose second mailbox place may take a full batch now."""
        if self.service_s >= PREFETCH_BELOW_S or len(self.jobs) < self.batch_size:
            return None
        for seat in self.seats:
            if len(seat.batches) == 1 and not seat.leaving and not seat.killed:
                return seat
        return None

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
