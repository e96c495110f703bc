"""The messages between supervisor, batcher, worker template and model worker, and what they carry: dataclasses.

`control.codec` says how they stand in a frame. Stdlib only; no behaviour.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import field
from typing import Any

from wsgi_ts.quick_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything a batcher and a model worker need to know of one model version.

    The supervisor makes it from the archive, the model-config.yaml and the register call; it travels as JSON.
    `ranks` is the number of processes on this machine of a model that torchrun starts (pp, tp, pptp), else 0;
    `torchrun` then holds the fields of TorchrunOptions. Times carry their unit in the name. `index` is the version's
    number on the data path (below MAX_MODELS), never reused while a request of the old owner can still be under way.
    `functions` are those of a workflow's handler file that the workers of this version run, by the name in a request:
    `model` and `function` are its names outside and in the file, `kind` one of FunctionKind, `batch_size` how many
    requests it takes at a time, `row` where its requests are counted on the board.
    Where `needs_preloaded` is false its workers are started without waiting for `preload_modules` to be imported; where
    `needs_numpy` is false, without numpy in the template that they are forks of.
    """

    index: int
    name: str
    version: str
    model_dir: str
    handler: str
    manifest: dict[str, Any] | None
    config_file: str | None = None
    runtime: str = "python"
    envelope: str | None = None
    batch_size: int = 1
    max_batch_delay_ms: int = 100
    batch_policy: str = "adaptive"
    batching: str | None = None
    response_timeout_s: float = 120.0
    startup_timeout_s: float = 120.0
    max_retry_timeout_s: float = 300.0
    client_timeout_ms: int = 0
    job_queue_size: int = 100
    use_job_ticket: bool = False
    decode_input_request: bool = True
    limit_max_image_pixels: bool = True
    weights_only: bool = True
    max_executions: int = 1
    max_response_bytes: int = 6553500
    threads_per_worker: int = 0
    python: str | None = None
    parallel_type: str = ""
    ranks: int = 0
    torchrun: dict[str, Any] | None = None
    metrics_config: str | None = None
    async_communication: bool = False
    continuous_batching: bool = False
    sequence_batching: bool = False
    sequence_max_idle_ms: int = 0
    sequence_timeout_ms: int = 0
    max_sequences: int = 1
    max_sequence_queue: int = 1
    min_workers: int = 1
    max_workers: int = 1
    needs_preloaded: bool = True
    needs_numpy: bool = True
    functions: dict[str, dict[str, Any]] = field(default_factory=dict)
    shown_name: str = ""

    @property
    def title(self) -> str:
        """The model's name as people, handlers and metrics of handlers know it.

        Another than `name` while a workflow's nodes stand ready to take over the names of those of another.
        """
        return self.shown_name or self.name

    @property
    def repeats(self) -> bool:
        """Whether the requests of a batch that failed may run again: nothing but the batch connects them."""
        has_state = self.continuous_batching or self.sequence_batching or self.async_communication
        return self.max_executions > 1 and not (has_state or self.ranks or self.functions)

    def worker_name(self, worker_id: int) -> str:
        """The name of one of its workers in logs and metrics, TorchServe's."""
        return f"W-{worker_id}-{self.title}_{self.version}"


#: Before the function's name in the last line of a worker that could not load it.
FUNCTION_FAILED = "Failed to load the workflow's function "


class FunctionKind:
    """What a function of a workflow answers with."""

    NODE = "node"  # what a handler returns
    WHEN = "when"  # whether a node runs
    SCATTER = "scatter"  # a list, whose elements go on one by one


class WorkerState(str, enum.Enum):
    """Where a model worker is in its life; `wsgi_ts.batcher.pool.pool` draws the ways between the states."""

    WAITING = "waiting"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RELEASING = "releasing"
    ENDING = "ending"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class WantedWorker:
    """A model worker that there should be: its number, its GPU (None: no GPU), and all that it may see (None: any)."""

    worker_id: int
    gpu_id: int | None = None
    devices: list[int] | None = None


@dataclass(frozen=True, slots=True)
class AttachSegment:
    """A web worker has made a segment: attach it."""

    index: int


@dataclass(frozen=True, slots=True)
class RetireSegment:
    """The owner of a segment is dead: let go of it when nothing runs into it any more."""

    index: int


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Make a model version known, or renew its settings."""

    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class SetWorkers:
    """Start and stop workers until exactly these exist; `replaced` of them go when others are ready in their place."""

    model_index: int
    workers: list[WantedWorker]
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class UnloadModel:
    """Stop all workers of a model, and forget it."""

    model_index: int


@dataclass(frozen=True, slots=True)
class ReopenLogs:
    """Open all log files again: they were renamed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop all workers and leave; `drain`: each may end its batch first."""

    drain: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """One life of a model worker: the worker's number (9000 …), and which of its lives it is."""

    worker_id: int
    start_count: int


@dataclass(frozen=True, slots=True)
class SpawnWorker(WorkerLife):
    """Start the process of a life of a model worker.

    Attributes:
        gpu_id: the GPU for its handler; None for the CPU.
        devices: the only GPUs that it may see; None for all.
        prefix: the start of the instance's shared-memory names.
        threads: CPU threads that its libraries may use; 0: as they like.
        traces: which of its batches a record is made of (`wsgi_ts.tracing.options`); None: of none.
    """

    spec: ModelSpec
    gpu_id: int | None
    devices: list[int] | None
    prefix: str
    batcher_index: int
    threads: int
    traces: dict[str, Any] | None = None

    @property
    def thread_name(self) -> str:
        """The name under which the worker's lines are logged."""
        return self.spec.worker_name(self.worker_id)

    def to_json(self) -> str:
        """Returns it as an argument for a process that is no fork of the template."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SpawnWorker:
        """Returns the order that `to_json` gave this text of."""
        fields = json.loads(text)
        return cls(**fields | {"spec": ModelSpec(**fields["spec"])})


@dataclass(frozen=True, slots=True)
class KillWorker(WorkerLife):
    """Kill this life of a worker; its exit is reported as any other."""


@dataclass(frozen=True, slots=True)
class TemplateStarted:
    """The template can start workers that need none of `preload_modules`; `TemplateReady` follows."""


@dataclass(frozen=True, slots=True)
class ReleaseWorker(WorkerLife):
    """Within a batcher: give the worker no further batch; after its last one ask it to leave, and say so."""


@dataclass(frozen=True, slots=True)
class WorkerReleased(WorkerLife):
    """Within a batcher: a worker has nothing in flight any more, and was asked to leave."""


@dataclass(frozen=True, slots=True)
class TemplateReady:
    """The template can start all workers; `missing`: why modules of `preload_modules` cannot be imported, by name."""

    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TemplateFailed:
    """The worker template has ended again and again before it had been ready."""


@dataclass(frozen=True, slots=True)
class WorkerStarted(WorkerLife):
    """A life of a worker has a process."""

    pid: int


@dataclass(frozen=True, slots=True)
class WorkerProgress(WorkerLife):
    """How far the loading of a worker of several ranks has come, for people."""

    text: str


@dataclass(frozen=True, slots=True)
class WorkerLoaded(WorkerLife):
    """A life has loaded its model, or not: `status` is HTTP-like (200, 500, 507; 408: it took too long)."""

    status: int
    message: str
    load_ms: int


@dataclass(frozen=True, slots=True)
class WorkerExited(WorkerLife):
    """A life is over: by exit code or by signal; both None (and pid -1): it could not be started."""

    pid: int
    code: int | None
    signal: str | None
    last_lines: list[str]


@dataclass(frozen=True, slots=True)
class MetricsReported:
    """What handlers have reported since the last time (`ModelMetrics.take_updates`)."""

    updates: list[list[Any]]


@dataclass(frozen=True, slots=True)
class BatcherStarted:
    """The batcher listens."""


@dataclass(frozen=True, slots=True)
class SegmentAttached:
    """The batcher has attached a segment."""

    index: int


@dataclass(frozen=True, slots=True)
class SegmentRetired:
    """The batcher has let go of a segment."""

    index: int


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One model worker, told each time its state changes; `stopped` is the last that is told of it.

    `load_status` is 0 until the first load ended, then the HTTP-like status of the load (200, 500, 507, 408).
    `restart_reason` says why there was the last restart (`pool.life.restart_reason`), as far as there was one.
    `recovering_since` is the monotonic time of the first failure of the current run of failures, 0.0 when none.
    """

    worker_id: int
    model_index: int
    state: WorkerState
    pid: int = -1
    gpu_id: int | None = None
    started_at_ms: int = 0
    progress: str = ""
    load_status: int = 0
    load_ms: int = 0
    restarts: int = 0
    restart_reason: str = ""
    recovering_since: float = 0.0
    exit_reason: str = ""
    last_lines: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModelUnloaded:
    """The last worker of a model that was unloaded is gone."""

    model_index: int


ToBatcher = AttachSegment | RetireSegment | LoadModel | SetWorkers | UnloadModel | ReopenLogs | Stop
ToTemplate = SpawnWorker | KillWorker | ReopenLogs
#: The first two of these a batcher passes on to the supervisor.
FromTemplate = (
    TemplateReady | MetricsReported | TemplateStarted | WorkerStarted | WorkerProgress | WorkerLoaded | WorkerExited
)
FromWorker = WorkerProgress | WorkerLoaded
FromBatcher = (
    TemplateReady
    | MetricsReported
    | BatcherStarted
    | TemplateFailed
    | SegmentAttached
    | SegmentRetired
    | WorkerReport
    | ModelUnloaded
)
