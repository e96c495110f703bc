"""What the scheduler decides: plain data, which `loop.BatcherLoop` carries out in the order given."""

from __future__ import annotations

from typing import NamedTuple

from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.model_queue import Batch, Worker
from wsgi_ts.batcher.shm.layout import NO_BATCH, ModelWord


class Dispatch(NamedTuple):
    """Post a batch to the worker's mailbox."""

    worker: Worker
    batch: Batch


class Fail(NamedTuple):
    """Answer jobs that no worker can write to; the text "" is composed by the web worker.

    `counted` is the ModelWord that counts them. `batch` is what is told of the batch that they were run in
    (`layout.BATCH`).
    """

    model: int
    jobs: list[Job]
    status: int
    text: str = ""
    counted: int = ModelWord.REFUSED
    batch: bytes = NO_BATCH


class Record(NamedTuple):
    """Count answered jobs; `posted_at` is None where the worker was busy when they were dispatched."""

    model: int
    jobs: list[Job]
    ended_at: float
    service_s: float
    posted_at: float | None = None
    begun_at: float = 0.0


class Repeat(NamedTuple):
    """Have the jobs of a batch that failed wait for another execution; their worker is dead, or has given them back."""

    model: int
    jobs: list[Job]


class Settle(NamedTuple):
    """Answer jobs that their worker has given back with the error that it has written."""

    model: int
    jobs: list[Job]


class Revoke(NamedTuple):
    """Take the worker's last batches back; of those for which that succeeds say so by `Scheduler.revoked`."""

    worker: Worker
    batches: list[Batch]


class Kill(NamedTuple):
    """Have the worker's process killed."""

    worker: Worker


class Release(NamedTuple):
    """Ask the worker, which has nothing in flight, to leave, and forget it."""

    worker: Worker


class Unloaded(NamedTuple):
    """Clear the gauges of a model version, which has ended."""

    model: int


Action = Dispatch | Fail | Record | Repeat | Settle | Revoke | Kill | Release | Unloaded
