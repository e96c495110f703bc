"""What a WorkerPool asks its batcher to do: one frozen dataclass for each kind of action.

Four are messages as they are: `KillWorker` for the worker template, `ReleaseWorker` for the batching thread,
`WorkerReport` and `ModelUnloaded` for the supervisor.
"""

from __future__ import annotations

from typing import Literal

from wsgi_ts.messages import KillWorker, ModelSpec, ModelUnloaded, ReleaseWorker, WorkerLife, WorkerReport
from wsgi_ts.quick_dataclass import dataclass

#: Why a life of a worker ended; `stopped` means that we wanted it.
Cause = Literal["died", "oom", "stopped"]


@dataclass(frozen=True, slots=True)
class StartTemplate:
    """Start a worker template; where an old one still runs (it hangs), end it and forget its channel."""


@dataclass(frozen=True, slots=True)
class StartWorker(WorkerLife):
    """Make the mailbox of this life of a worker, then have the template spawn it."""

    spec: ModelSpec
    gpu_id: int | None
    devices: list[int] | None = None


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The worker has loaded its model: it may be given batches."""

    worker_id: int
    model_index: int
    start_count: int


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """This life of the worker is over: answer what it ran (507 for cause `oom`), remove its mailbox.

    Sent exactly once for every StartWorker.
    """

    worker_id: int
    start_count: int
    cause: Cause


Action = (
    StartTemplate | StartWorker | ReleaseWorker | WorkerReady | WorkerGone | KillWorker | WorkerReport | ModelUnloaded
)
