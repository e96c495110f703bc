"""The jobs and workers of one model version on one batcher, and which jobs go to which worker next. Pure.

`Worker` is what the scheduler knows of one life of a model worker, `Batch` what was dispatched to it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from wsgi_ts.batcher.scheduler.halving import Halving
from wsgi_ts.batcher.scheduler.job import Job, JobQueue
from wsgi_ts.batcher.scheduler.policy import NONE, BatchPolicy, CloseReason, make_policy
from wsgi_ts.batcher.scheduler.sequences import SequenceQueue
from wsgi_ts.batcher.shm.layout import BATCH, SlotState
from wsgi_ts.batcher.shm.worker_layout import MAIL_PLACES
from wsgi_ts.messages import ModelSpec

#: A worker gets its next batch while one runs only where batches are this short (seconds): the time between two
#: matters there, and a job that waits in a mailbox cannot be taken by a worker that falls idle (except by `Revoke`).
PREFETCH_BELOW_S: Final = 0.005
#: A worker, and the batcher, that are woken for each batch of some dozens of microseconds do little else, so where
#: batches are shorter than this (seconds) several may lie ready. Where another worker could fall idle meanwhile, all of
#: them together are no longer.
READY_S: Final = 0.001
#: A batch that lies behind one running this many times longer than usual is taken back.
OVERDUE_FACTOR: Final = 10.0
OVERDUE_LEAST_S: Final = 0.05
#: Requests under way at a time in a worker whose handler is asynchronous; more wait in the queue. An engine behind such
#: a handler has a limit of its own: this one bounds what a worker's death costs.
ASYNC_LIMIT: Final = 1024
#: What a worker that does not take its batch gets on top of its response timeout: another one may have been before it.
UNTAKEN_MARGIN_S = 1.0
#: A moment that does not come.
NEVER: Final = math.inf
#: What a worker of which nobody says otherwise can be given at once.
_ANY_NUMBER: Final = 1 << 30
_SMOOTHING: Final = 0.1
#: The most requests that a batch is said to have.
_MOST_TOLD: Final = 0xFFFF

#: A worker, the jobs that go to it now, and why they go (a `CloseReason`).
NextBatch = tuple["Worker", list[Job], int]


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs that were dispatched together; of a continuous batch, `jobs` loses those that have ended.

    Attributes:
        number: the mailbox's number of it.
        posted_at: when it was dispatched (monotonic seconds).
        alone: whether the worker had nothing else to do.
        reason: why it went as it was; a `CloseReason`.
        revoked: whether the worker was told not to begin it.
    """

    number: int
    jobs: list[Job]
    posted_at: float
    alone: bool
    reason: int = CloseReason.UNKNOWN
    revoked: bool = False

    @property
    def is_answered(self) -> bool:
        """True if every job has its answer; the worker reports the end of the batch a moment later."""
        return not any(job.is_with_worker for job in self.jobs)

    def facts(self, worker_id: int) -> bytes:
        """What the slots of its requests tell of it where its worker, which has this number, cannot any more."""
        size = min(len(self.jobs), _MOST_TOLD)
        posted_ns = int(self.posted_at * 1e9)
        return BATCH.pack(posted_ns, self.number, worker_id, size, self.reason, 0.0, 0.0, 0.0, 0.0)

    def take_unbegun(self) -> list[Job]:
        """Removes the jobs that no handler has begun, nor will; returns those that somebody still waits for."""
        unbegun = [job for job in self.jobs if job.is_unbegun]
        self.jobs = [job for job in self.jobs if not job.is_unbegun]
        return [job for job in unbegun if not job.segment.retired]

    def given_back(self) -> list[Job]:
        """The jobs that a handler has had and nobody will answer: it failed, or its worker is dead."""
        return [job for job in self.jobs if job.state == SlotState.RUNNING]


@dataclass(slots=True, eq=False, repr=False)
class Worker:
    """The handle of one life of a model worker.

    Attributes:
        start_count: which life of it this is.
        capacity: requests that it can be given at once: what its mailbox holds, whatever the model's present settings.
        batches: what it has in flight, oldest first.
        posted: number of the last batch dispatched to it.
        done: number of the last batch it is known to have done.
        held: asked to leave, and kept for the jobs that its model still has.
        leaving: it gets no further batch, and leaves after those that it has.
        killed: it is to be killed.
        idle_since: since when it has nothing to do (monotonic seconds).
    """

    worker_id: int
    start_count: int
    model: int
    capacity: int = _ANY_NUMBER
    batches: list[Batch] = field(default_factory=list)
    posted: int = 0
    done: int = 0
    held: bool = False
    leaving: bool = False
    killed: bool = False
    idle_since: float = 0.0

    @property
    def takes_more(self) -> bool:
        """Whether it may be given batches at all."""
        return not self.leaving and not self.killed

    @property
    def is_blocked(self) -> bool:
        """Whether batches behind one that runs too long were taken back, and lie there still."""
        return any(batch.revoked for batch in self.batches)

    @property
    def in_flight(self) -> int:
        """Requests that it has."""
        return sum(len(batch.jobs) for batch in self.batches)

    def take_answered(self) -> list[Job]:
        """Removes the jobs of its continuous batches that have their answers, as their slots say."""
        answered: list[Job] = []
        for batch in self.batches:
            in_flight: list[Job] = []
            for job in batch.jobs:
                (in_flight if job.is_with_worker else answered).append(job)
            batch.jobs = in_flight
        self.batches = [batch for batch in self.batches if batch.jobs]
        return answered

    def __repr__(self) -> str:
        return f"<Worker {self.worker_id} batches {[batch.number for batch in self.batches]}>"


class ModelQueue:
    """Jobs, workers and batching rule of one model version.

    Attributes:
        sequences: the jobs by sequence, where the model has sequences; it is `jobs`, too.
        halving: what becomes of batches that fail, where their requests may run again.
        joins_steps: whether new jobs join those that are under way: a continuous batch, or an asynchronous handler.
        service_s: how long a batch takes, smoothed; starts where no batch is dispatched ahead.
        closes_at: until when a version that is unregistered may still get jobs (monotonic seconds); NEVER for others.
        held_until: until when its last worker, which was asked to leave, is kept in any case; NEVER where none is.
        accepting: False once an unregistered version has served what it had.
        wait_until: when to ask for `next_batch` again if nothing else happens before (monotonic seconds).
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.workers: list[Worker] = []
        self.joins_steps = spec.continuous_batching or spec.async_communication
        self.sequences = SequenceQueue(spec, lambda: self.ready_workers) if spec.sequence_batching else None
        self.jobs = JobQueue(spec.job_queue_size) if self.sequences is None else self.sequences
        self._has_tickets = spec.use_job_ticket and not spec.sequence_batching
        # Each ticket is one worker's: what was let in together goes to as many workers.
        self.batch_size = 1 if self._has_tickets else largest_batch(spec)
        # What joins at the next step, has a worker by its ticket or waits in a sequence has nothing else to wait for.
        self._never_waits = self.joins_steps or self._has_tickets or spec.sequence_batching
        self.policy: BatchPolicy = self._policy_of(spec)
        self.halving = Halving(spec.max_executions) if spec.repeats else None
        self.service_s = math.inf if self.joins_steps else PREFETCH_BELOW_S  # streams are never short
        self.accepting = True
        self.closes_at = self.held_until = self.wait_until = NEVER

    def renew(self, spec: ModelSpec) -> None:
        """Takes over other settings while requests wait and run.

        How requests come together (in steps, in sequences, by tickets) stays what it was when the model was loaded.
        """
        if _way_of(spec) != _way_of(self.spec):
            return
        before, self.spec = self.spec, spec
        self.batch_size = 1 if self._has_tickets else largest_batch(spec)
        self.jobs.capacity = spec.job_queue_size if self.sequences is None else self.jobs.capacity
        if (spec.batch_policy, spec.max_batch_delay_ms) != (before.batch_policy, before.max_batch_delay_ms):
            self.policy = self._policy_of(spec)

    def _policy_of(self, spec: ModelSpec) -> BatchPolicy:
        return make_policy(NONE if self._never_waits else spec.batch_policy, spec.max_batch_delay_ms / 1000)

    def offer(self, jobs: list[Job]) -> list[Job]:
        """Queues jobs; returns those that are refused."""
        if not self.accepting:
            return jobs
        if not self._has_tickets:
            return self.jobs.offer(jobs)
        room = max(0, self.free_workers() - len(self.jobs))
        return self.jobs.offer(jobs[:room]) + jobs[room:]

    def next_batch(self, now: float) -> NextBatch | None:
        """Takes from the queue what goes to a worker now; None when nothing does.

        Only while jobs wait. The worker's mailbox has room for it.
        """
        self.wait_until = NEVER
        if self.sequences is not None:
            return self._next_of_sequences(self.sequences)
        if self.joins_steps:
            return self._next_to_join()
        worker = self.idle_worker()
        if worker is not None:
            most = min(self.batch_size, worker.capacity)
            if self.jobs.is_returned:
                jobs = self.jobs.take(most)
                return worker, jobs, CloseReason.SUSPECT if jobs[0].most else CloseReason.IDLE
            wait = self.policy.decide(now, len(self.jobs), self.jobs.oldest_at, most)
            if wait > 0:
                self.wait_until = now + wait
                return None
            return worker, self.jobs.take(most), self.policy.reason
        worker = self._worker_to_prefetch()
        if worker is None:
            return None
        return worker, self.jobs.take(min(self.batch_size, worker.capacity)), CloseReason.FULL

    def idle_worker(self) -> Worker | None:
        """A worker with nothing to do."""
        for worker in self.workers:
            if not worker.batches and not worker.leaving and not worker.killed:
                return worker
        return None

    def free_workers(self) -> int:
        """Workers with nothing to do, or about to say so: a client that has its answer may come back before that."""
        return sum(all(batch.is_answered for batch in worker.batches) for worker in self.workers if worker.takes_more)

    def _worker_to_prefetch(self) -> Worker | None:
        """Of the busy workers that may have a further full batch lie ready in their mailbox, the one with fewest."""
        if self.service_s >= PREFETCH_BELOW_S or len(self.jobs) < self.batch_size:
            return None
        most = 2
        if self.service_s < READY_S and self.halving is None:  # a worker tells of one batch that took too much memory
            ready = 1 + int(READY_S / max(self.service_s, 1e-6))
            most = MAIL_PLACES if len(self.workers) == 1 else min(MAIL_PLACES, ready)
        found: Worker | None = None
        for worker in self.workers:
            if len(worker.batches) < most and worker.takes_more and not worker.is_blocked:
                most = len(worker.batches)
                found = worker
        return found

    def _next_to_join(self) -> NextBatch | None:
        """The worker whose continuous batch has most room, and its share of the jobs."""
        roomy = [worker for worker in self.workers if self._room(worker) > 0]
        if not roomy:
            return None
        worker = max(roomy, key=self._room)
        share = -(-len(self.jobs) // len(roomy))
        return worker, self.jobs.take(min(share, self._room(worker))), CloseReason.JOINED

    def _next_of_sequences(self, sequences: SequenceQueue) -> NextBatch | None:
        """The worker that has waited longest of those for which there are jobs of sequences, and these jobs."""
        for worker in sorted(self.workers, key=attrgetter("idle_since")):
            room = self._room(worker)
            taken = sequences.take_for(worker.worker_id, room) if room > 0 else []
            if taken:
                return worker, taken, CloseReason.SEQUENCE
        return None

    def _room(self, worker: Worker) -> int:
        """How many requests a worker can take: as many as join its continuous batch, or a batch if it has none."""
        if not worker.takes_more or worker.posted - worker.done >= MAIL_PLACES:
            return 0
        most = min(self.batch_size, worker.capacity)
        if self.joins_steps:
            return most - worker.in_flight
        return 0 if worker.batches else most

    def end_sequences_of(self, worker: Worker) -> list[Job]:
        """Ends the sequences of a worker that is gone, or is to go; returns the jobs that wait in them."""
        return [] if self.sequences is None else self.sequences.end_those_of(worker.worker_id)

    def note_returned(self, jobs: list[Job]) -> None:
        """Learns from requests whose clients had an answer before how soon clients come back."""
        if jobs:
            count = len(jobs)
            arrived_at = sum([job.arrived_ns for job in jobs]) / count / 1e9
            self.policy.on_returned(arrived_at, count, sum([job.idle_us for job in jobs]) / count / 1e6)

    def learn(self, count: int, service_s: float, ended_at: float) -> None:
        """Learns from a finished batch how long batches take, and that its clients may come back."""
        self.service_s += _SMOOTHING * (service_s - self.service_s)
        self.policy.on_batch(count, service_s)
        self.policy.on_answered(ended_at, count)

    def oldest_in_time_ns(self, now: float) -> int:
        """Requests that arrived before this monotonic time (ns) have passed the model's clientTimeoutInMills."""
        limit_ms = self.spec.client_timeout_ms
        return int(now * 1e9) - limit_ms * 1_000_000 if limit_ms else 0

    def is_hung(self, worker: Worker, started: int, runs_s: float | None, now: float) -> bool:
        """Whether a worker's batch runs too long, or is not even taken.

        `started` is the number of the last batch that it has begun, `runs_s` how long that has run; None where nothing
        runs.
        """
        limit_s = self.spec.response_timeout_s
        if runs_s is not None:
            return runs_s > limit_s
        # One that does not take what it has been given hangs (or is stopped). But an asynchronous handler may keep its
        # event loop from taking more for as long as it likes.
        posted_at = next((batch.posted_at for batch in worker.batches if batch.number > started), now)
        return now - posted_at > limit_s + UNTAKEN_MARGIN_S and not self.spec.async_communication

    def stuck_behind(self, worker: Worker, started: int, runs_s: float | None) -> list[Batch]:
        """The batches behind one that runs unusually long, where an idle worker could have them; see `is_hung`."""
        if runs_s is None or runs_s <= max(OVERDUE_LEAST_S, OVERDUE_FACTOR * self.service_s):
            return []
        behind = [batch for batch in worker.batches if batch.number > started]
        return behind if behind and not behind[-1].revoked and self.idle_worker() is not None else []

    @property
    def outstanding(self) -> int:
        """Jobs queued or in flight."""
        return len(self.jobs) + sum([len(batch.jobs) for worker in self.workers for batch in worker.batches])

    @property
    def is_active(self) -> bool:
        """Whether jobs wait here, or its end or that of a worker is under way."""
        ends = self.closes_at < NEVER or self.held_until < NEVER
        return len(self.jobs) > 0 or ends or any(worker.leaving for worker in self.workers)

    def is_last(self, worker: Worker) -> bool:
        """Whether no other worker is there to serve what waits; of sequences each has its own worker."""
        others = (each for each in self.workers if each is not worker)
        return self.sequences is None and not any(each.takes_more and not each.held for each in others)

    @property
    def ready_workers(self) -> int:
        """Workers that take jobs."""
        return sum(not worker.leaving for worker in self.workers)


def _way_of(spec: ModelSpec) -> tuple[bool, bool, bool, bool]:
    """How requests of a model come together."""
    return spec.continuous_batching, spec.async_communication, spec.sequence_batching, spec.use_job_ticket


def largest_batch(spec: ModelSpec) -> int:
    """Requests that a worker has at most, what its mailbox must hold; streamed sequences double it."""
    if spec.async_communication:
        return ASYNC_LIMIT
    doubled = spec.sequence_batching and spec.continuous_batching
    return max(1, spec.batch_size) * (2 if doubled else 1)
