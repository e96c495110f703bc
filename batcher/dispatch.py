"""Which batch goes to which model worker, and what the death of one means. Pure: no clock, no system call.

`ModelQueue` holds what a batcher knows of one model version, `WorkerSeat` what it knows of one life of a model worker.
"""

from __future__ import annotations

from typing import Protocol

from wsgi_ts.batcher.counters import ModelCounters
from wsgi_ts.batcher.job_queue import JobQueue
from wsgi_ts.batcher.policy import BatchPolicy, make_policy
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
    """Jobs that were handed to a worker together."""

    __slots__ = ("arrivals_ns", "jobs", "number", "posted_at", "revoked")

    def __init__(self, number: int, jobs: list[int], posted_at: float, arrivals_ns: list[int]) -> None:
        self.number = number
        self.jobs = jobs
        self.posted_at = posted_at
        self.arrivals_ns = arrivals_ns
        self.revoked = False


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
    """

    def __init__(self, spec: ModelSpec, counters: ModelCounters) -> None:
        self.spec = spec
        self.counters = counters
        self.jobs = JobQueue(spec.job_queue_size)
        self.seats: list[WorkerSeat] = []
        self.policy: BatchPolicy = make_policy(spec.batch_policy, spec.max_batch_delay_ms / 1000)
        self.service_s = PREFETCH_BELOW_S  # smoothed; starts where no batch is handed over early
        self.accepting = True

    def idle_seat(self) -> WorkerSeat | None:
        """A worker with nothing to do."""
        for seat in self.seats:
            if not seat.batches and not seat.leaving:
                return seat
        return None

    def prefetch_seat(self) -> WorkerSeat | None:
        """A busy worker whose second mailbox place may take a full batch now."""
        if self.service_s >= PREFETCH_BELOW_S or len(self.jobs) < self.spec.batch_size:
            return None
        for seat in self.seats:
            if len(seat.batches) == 1 and not seat.leaving and not seat.killed:
                return seat
        return None

    def note_service(self, seconds: float) -> None:
        """Learns from a finished batch how long batches take."""
        self.service_s += _SMOOTHING * (seconds - self.service_s)

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
