"""What the registry keeps of a model version and of each of its workers."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import field
from typing import Any

from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.errors import ConflictStatus
from wsgi_ts.gpu.assign import Placement
from wsgi_ts.messages import ModelSpec, WorkerReport, WorkerState
from wsgi_ts.models.model_yaml import ModelYaml
from wsgi_ts.quick_dataclass import dataclass

#: States of a worker in which it has never been of use yet.
LOADING_STATES = ("starting", "loading")


@dataclass(slots=True)
class WorkerRecord:
    """One model worker that is wanted. `report` is None until its batcher has said something of it.

    `devices` are the GPUs of a worker that spans several; None where it is not restricted to any.

    `created_at_ms` is in milliseconds since the epoch, for people. `started_with` are the batch size and the CPU
    threads of the settings that it was started from; `is_replaced`: it goes as soon as another one is ready instead.
    """

    worker_id: int
    batcher: int
    gpu_id: int | None
    created_at_ms: int
    devices: tuple[int, ...] | None = None
    report: WorkerReport | None = None
    started_with: tuple[int, int] = (1, 0)
    is_replaced: bool = False

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs it computes on."""
        return self.devices or (() if self.gpu_id is None else (self.gpu_id,))

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.report is not None and self.report.state == WorkerState.READY

    @property
    def is_pending(self) -> bool:
        """Whether its first load is still under way."""
        report = self.report
        return report is None or (report.state in LOADING_STATES and report.load_status == 0)

    def is_recovering_too_long(self, limit_s: float, now: float) -> bool:
        """Whether it has been failing for more than `limit_s` seconds at the monotonic time `now`."""
        report = self.report
        if report is None or self.is_ready:
            return False
        late = report.recovering_since > 0 and now - report.recovering_since > limit_s
        return report.state == WorkerState.FAILED or late


@dataclass(slots=True)
class Trial:
    """Somebody tries other settings on a version that serves; what was there before comes back at the end.

    Attributes:
        owner_pid: the process that tries.
        spec, min_workers, max_workers: what held before.
    """

    owner_pid: int
    spec: ModelSpec
    min_workers: int
    max_workers: int


@dataclass(slots=True)
class ModelVersion:
    """One version of a model.

    Attributes:
        spec: what batchers and workers are told.
        directory: its files.
        yaml: its model-config.yaml, None where it has none.
        placement: where its workers may run.
        min_workers: workers that are wanted.
        max_workers: upper limit, shown only.
        loaded_at_startup: whether the configuration named it.
        workers: those that are wanted, by id in the order of their start.
        gpus_given: how many workers were given a GPU so far.
        loaded_in: batchers that were told of it.
        accepted_in: batchers that have shown that they know it; requests go to these only.
        leaving: workers that were told to stop, and have not yet.
        restarts: how often one of its workers was started again, by reason.
        unloading: it is being unregistered: no requests any more.
        operation: held by the one operation that changes it at a time.
        load_lines: the last lines of the worker that has failed to load it last.
        workflow: the workflow whose node it is, or whose functions it runs; "" for a model of its own.
        is_scaled: somebody has said how many workers it has since it was registered; of nodes of workflows only.
        trial: other settings are being tried on it; None where not.
    """

    spec: ModelSpec
    directory: ModelDirectory
    yaml: ModelYaml | None
    placement: Placement
    min_workers: int = 0
    max_workers: int = 0
    loaded_at_startup: bool = False
    workers: dict[int, WorkerRecord] = field(default_factory=dict)
    gpus_given: int = 0
    loaded_in: set[int] = field(default_factory=set)
    accepted_in: set[int] = field(default_factory=set)
    leaving: dict[int, WorkerRecord] = field(default_factory=dict)
    restarts: Counter[str] = field(default_factory=Counter)
    unloading: bool = False
    operation: threading.Lock = field(default_factory=threading.Lock)
    load_lines: list[str] = field(default_factory=list)
    workflow: str = ""
    is_scaled: bool = False
    trial: Trial | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def version(self) -> str:
        """The version's name."""
        return self.spec.version

    @property
    def is_ready(self) -> bool:
        """Whether a worker of it takes requests."""
        return any(worker.is_ready for worker in self.workers.values())

    @property
    def is_pending(self) -> bool:
        """Whether no worker of it is ready, and the first load of one is still under way."""
        return not self.is_ready and any(worker.is_pending for worker in self.workers.values())

    def workers_in(self, batcher: int) -> list[WorkerRecord]:
        """The wanted workers of one batcher."""
        return [worker for worker in self.workers.values() if worker.batcher == batcher]

    @property
    def kept(self) -> Trial | ModelVersion:
        """What holds of it when nothing is tried any more: `spec`, `min_workers`, `max_workers`."""
        return self.trial or self

    def refuse_while_tried(self) -> None:
        """Raises ConflictStatus where somebody tries settings on it, which nobody else is to change then."""
        if self.trial is not None:
            raise ConflictStatus(
                f"Process {self.trial.owner_pid} tries settings on model {self.name} version {self.version} (wsgi-ts "
                "tune): wait for its end, or end it; then everything is as before."
            )

    def is_healthy(self, now: float) -> bool:
        """Whether enough workers run, or will soon, at the monotonic time `now`."""
        limit_s = self.spec.max_retry_timeout_s
        good = [each for each in self.workers.values() if not each.is_recovering_too_long(limit_s, now)]
        return len(good) >= self.min_workers

    def routes(self) -> dict[str, Any]:
        """What the data path has to know of it; of its batchers only those that know it themselves."""
        counts = {batcher: len(self.workers_in(batcher)) for batcher in sorted(self.accepted_in)}
        return {
            "index": self.spec.index,
            "batchers": {str(batcher): count for batcher, count in counts.items() if count},
            "client_timeout_ms": self.spec.client_timeout_ms,
            "continuous": self.spec.continuous_batching,
            "sequences": self.spec.sequence_batching,
            "loaded": self.is_ready,
        }
