"""One model worker as its batcher's pool knows it: its record, its log lines, what its exit means."""

from __future__ import annotations

import logging
import math
from dataclasses import field

from wsgi_ts.batcher.pool.actions import Cause
from wsgi_ts.batcher.spawn.exit import EXIT_CODE_OUT_OF_MEMORY
from wsgi_ts.messages import ModelSpec, WorkerReport, WorkerState
from wsgi_ts.quick_dataclass import dataclass

#: Seconds before the n-th restart in a row of failures; the last one repeats. TorchServe's sequence.
BACKOFF_S = (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597)
#: A worker that was ready for so many seconds before it failed is started again without waiting.
STABLE_S = 10.0
#: A template that served this long before it died is replaced at once.
TEMPLATE_STABLE_S = 60.0
#: Why workers are started again, for the metrics. A timeout: no answer within the model's response timeout.
RESTART_REASONS = ("died", "load_failed", "out_of_memory", "template_died", "timeout")
HTTP_OK = 200
HTTP_TIMEOUT = 408
HTTP_ERROR = 500
HTTP_OUT_OF_MEMORY = 507

# TorchServe's logger: people and tools search for its lines.
_logger = logging.getLogger("org.pytorch.serve.wlm.WorkerThread")


#: The states in which a process exists, or has been asked for.
HAS_PROCESS = frozenset(
    (WorkerState.STARTING, WorkerState.LOADING, WorkerState.READY, WorkerState.RELEASING, WorkerState.ENDING)
)
BEFORE_READY = frozenset((WorkerState.STARTING, WorkerState.LOADING))


@dataclass(slots=True)
class Template:
    """The worker template, as far as it has come."""

    #: It starts workers; `ready`: those, too, that need what it imports beforehand.
    started: bool = False
    ready: bool = False
    #: When it was ready, and until when another one waits or this one has to be (monotonic seconds).
    ready_at: float = math.inf
    deadline: float = math.inf
    #: Deaths in a row; one that had been of use begins anew.
    failures: int = 0

    def can_start(self, spec: ModelSpec) -> bool:
        """Whether it can start a worker of this model version."""
        return self.ready or (self.started and not spec.needs_preloaded)

    def note_ready(self, now: float) -> None:
        """It has imported what it was to import."""
        self.ready, self.ready_at, self.deadline = True, now, math.inf

    def note_death(self, now: float) -> int:
        """It is dead; returns the seconds after which another one is to be started."""
        if self.ready:
            # It was of use, and so will the next be: no loop, however often it is killed.
            self.failures = 0 if now - self.ready_at >= TEMPLATE_STABLE_S else min(self.failures, 1)
        self.failures += 1
        delay = 0 if self.failures == 1 else backoff_s(self.failures - 1)
        self.deadline = now + delay
        return delay


@dataclass(slots=True)
class Model:
    """A model version that this batcher runs."""

    spec: ModelSpec
    removed: bool = False
    #: Batches and loads without an answer since the last load that succeeded; for the log.
    timeouts_in_a_row: int = 0


@dataclass(slots=True)
class Worker:
    """A model worker: what is wanted of it, and its present life (numbered by `start_count`)."""

    worker_id: int
    model: Model
    gpu_id: int | None
    #: The only GPUs it may see; None: all.
    devices: list[int] | None
    started_at_ms: int
    wanted: bool = True
    state: WorkerState = WorkerState.WAITING
    #: When the state has lasted too long, monotonic seconds.
    deadline: float = math.inf
    start_count: int = 0
    pid: int = -1
    #: When this life had loaded its model, monotonic seconds.
    ready_at: float = math.inf
    load_status: int = 0
    load_ms: int = 0
    #: This life was asked to go while it had done nothing wrong.
    stopping: bool = False
    #: This life got SIGKILL from us, so that SIGKILL does not mean "out of memory".
    killed: bool = False
    #: How far the loading of a worker of several ranks has come, for people.
    progress: str = ""
    #: What this life did wrong, as far as it is known before its exit.
    fault: str = ""
    #: Failures in a row, and when (monotonic seconds) the first of them was.
    failures: int = 0
    recovering_since: float | None = None
    #: How the last life ended.
    exit_reason: str = ""
    #: The same for the metrics (`restart_reason`).
    restart_reason: str = ""
    last_lines: list[str] = field(default_factory=list)
    #: TorchServe's name of the state, for the log.
    log_state: str = "null"

    @property
    def model_index(self) -> int:
        """The number of the worker's model on the data path."""
        return self.model.spec.index

    @property
    def thread_name(self) -> str:
        """The name TorchServe's log gives to a worker."""
        return self.model.spec.worker_name(self.worker_id)

    def begin(self, state: WorkerState, deadline: float = math.inf) -> None:
        """Enters a state that may last until `deadline` (monotonic seconds)."""
        self.state, self.deadline = state, deadline

    def log(self, level: int, text: str, *args: object, cause: str | None = None) -> None:
        """Logs a line under the worker's name; `cause` gets a line of its own below it, as an exception does."""
        if _logger.isEnabledFor(level):
            record = _logger.makeRecord(_logger.name, level, __file__, 0, text, args, None)
            record.threadName = self.thread_name
            record.exc_text = cause
            _logger.handle(record)

    def log_change(self, state: str) -> None:
        """Logs a change of state, in TorchServe's words."""
        self.log(logging.DEBUG, "%s State change %s -> %s", self.thread_name, self.log_state, state)
        self.log_state = state

    def report(self, state: WorkerState | None = None) -> WorkerReport:
        """Returns what the supervisor is told; `state` counts in the place of the worker's own."""
        shown = WorkerState.STARTING if self.state is WorkerState.WAITING else self.state
        return WorkerReport(
            worker_id=self.worker_id,
            model_index=self.model_index,
            state=state or shown,
            pid=self.pid,
            gpu_id=self.gpu_id,
            progress=self.progress,
            started_at_ms=self.started_at_ms,
            load_status=self.load_status,
            load_ms=self.load_ms,
            restarts=max(self.start_count - 1, 0),
            restart_reason=self.restart_reason,
            recovering_since=self.recovering_since or 0.0,
            exit_reason=self.exit_reason,
            last_lines=self.last_lines,
        )


def restart_delay_s(worker: Worker, now: float) -> int:
    """Seconds to wait before a worker that has just failed (`failures` times in a row) is started again."""
    was_stable = now - worker.ready_at >= STABLE_S
    return 0 if was_stable else backoff_s(worker.failures)


def backoff_s(failures: int) -> int:
    """Seconds to wait after the n-th failure in a row (from 1)."""
    return BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]


def restart_reason(worker: Worker, cause: Cause, *, blame: bool) -> str:
    """Why a worker whose process is gone is started again: one of RESTART_REASONS.

    Asked when what the end means has been noted; `cause` is what `judge_exit` says, `blame` whether the failure is the
    worker's own.
    """
    if not blame:
        return "template_died"
    if cause == "oom":
        return "out_of_memory"
    if worker.load_status != HTTP_OK:
        return "load_failed"
    return "timeout" if worker.killed else "died"


def judge_exit(worker: Worker, code: int | None, signal: str | None) -> tuple[Cause, str]:
    """What the exit of a worker's process means, and a sentence about it.

    The worker's record is as it was before the exit. `code` is None where a signal ended it, `signal`, that one's name,
    where it exited; both are None where there never was a process.
    """
    if code is None and signal is None:
        return "died", "the process could not be started"
    how = f"killed by {signal}" if signal else f"exit code {code}"
    left_when_asked = worker.state is WorkerState.ENDING or code == 0
    if worker.stopping and not worker.fault and left_when_asked:
        return "stopped", how
    unasked_kill = signal == "SIGKILL" and not worker.killed
    failed_load = bool(worker.fault) and worker.load_status == HTTP_OUT_OF_MEMORY
    if code == EXIT_CODE_OUT_OF_MEMORY or unasked_kill or failed_load:
        return "oom", f"{worker.fault or 'out of memory'} ({how})"
    return "died", worker.fault or how
