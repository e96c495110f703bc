"""The types that cross a boundary between two parts of the server. Stdlib only; no behaviour beyond (de)coding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything a batcher and a model worker need to know of one model version.

    The supervisor makes it from the archive, the model-config.yaml and the register call; it travels as JSON.
    `ranks` is the number of processes on this machine of a model that torchrun starts (pp, tp, pptp), else 0;
    `torchrun` then holds the fields of TorchrunOptions. Times carry their unit in the name. `index` is the version's
    number on the data path (below MAX_MODELS), never reused while a request of the old owner can still be under way.
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
    response_timeout_s: float = 120.0
    startup_timeout_s: float = 120.0
    max_retry_timeout_s: float = 300.0
    client_timeout_ms: int = 0
    job_queue_size: int = 100
    use_job_ticket: bool = False
    decode_input_request: bool = True
    limit_max_image_pixels: bool = True
    weights_only: bool = True
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelSpec:
        """The spec on the other side of a control channel."""
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a batcher tells the supervisor of one model worker, each time its state changes.

    `state` is one of: starting, loading, ready, backoff (dead, will be started again), failed (given up after
    `max_retry_timeout_s`), stopped (asked to go; the last report of this worker).
    `load_status` is 0 until the first load ended, then the HTTP-like status of the load (200, 500, 507).
    `recovering_since` is the monotonic time of the first failure of the current run of failures, 0.0 when none.
    """

    worker_id: int
    model_index: int
    state: str
    pid: int = -1
    gpu_id: int | None = None
    started_at_ms: int = 0
    progress: str = ""
    load_status: int = 0
    load_ms: int = 0
    restarts: int = 0
    recovering_since: float = 0.0
    exit_reason: str = ""
    last_lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> WorkerReport:
        """The report on the other side of a control channel."""
        return cls(**fields)
