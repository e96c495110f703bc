"""Which model workers a batcher should have, which it has, and what to do about the difference.

A state machine without processes, sockets or clocks: the batcher tells it what happened and at what time
(monotonic), and gets a list of actions (`actions`) to carry out, in order. The life of one worker:

    waiting --> starting --> loading --> ready --> releasing --> ending --> gone
       ^            |           |          |
       |            v           v          v
       +------------------- backoff  or  failed: given up, `max_retry_timeout_s` after the first failure

waiting: for the worker template, and for what it imports beforehand where the handler needs that. releasing: finishes
its batch, gets no other. ending: was killed or asked to leave, its exit is not yet seen. Not thread-safe: all calls
come from the batcher's control thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

from wsgi_ts import messages
from wsgi_ts.batcher.pool.actions import Action, Cause, StartTemplate, StartWorker, WorkerGone, WorkerReady
from wsgi_ts.batcher.pool.life import (
    BEFORE_READY,
    HAS_PROCESS,
    HTTP_ERROR,
    HTTP_OK,
    HTTP_OUT_OF_MEMORY,
    HTTP_TIMEOUT,
    Model,
    Template,
    Worker,
    judge_exit,
    restart_delay_s,
    restart_reason,
)
from wsgi_ts.messages import FromTemplate, KillWorker, ModelSpec, ModelUnloaded, WantedWorker, WorkerState

#: How long a process may take from fork or exec to its first instruction of ours, as TorchServe allows.
START_TIMEOUT_S = 120.0
#: How long the worker template may take to import what it imports.
TEMPLATE_TIMEOUT_S = 120.0
#: How long a worker that was asked to leave (or could not load) may take to exit by itself.
EXIT_GRACE_S = 2.0
#: A kill that showed no effect is repeated after this time.
KILL_REPEAT_S = 5.0
#: What a worker that is being released gets on top of its response timeout, in case nobody else ends it.
RELEASE_MARGIN_S = 5.0
_NO_RESPONSE = "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time"

log = logging.getLogger(__name__)


class WorkerPool:
    """The model workers of one batcher.

    Every method that takes `now` (monotonic seconds) returns the actions to carry out. Call `tick` no later
    than `next_wake_at`, and whenever it is convenient.

    Args:
        wall_ms: the wall clock in epoch milliseconds, for the times people read.
    """

    def __init__(self, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._wall_ms = wall_ms
        self._models: dict[int, Model] = {}
        self._workers: dict[int, Worker] = {}
        self._actions: list[Action] = []
        self._template = Template()
        self._stopping = False

    def start(self, now: float) -> list[Action]:
        """Asks for the worker template, so that it is warm when the first model comes."""
        self._start_template(now)
        return self._take_actions()

    def set_model(self, spec: ModelSpec) -> None:
        """Makes a model version known, or renews its settings (running workers keep the old ones)."""
        known = self._models.get(spec.index)
        if known is not None and not known.removed:
            known.spec = spec
        else:
            self._models[spec.index] = Model(spec)

    def set_workers(self, model_index: int, wanted: Iterable[WantedWorker], now: float) -> list[Action]:
        """Starts and stops workers of a model until exactly these exist.

        Args:
            model_index: a model made known with `set_model`.
            wanted: all that there should be. A worker that exists keeps its GPU; the id of a worker that was reported
                as stopped is not used again.
            now: monotonic seconds.

        Raises:
            ValueError: the model is not known, or a worker id belongs to another model.
        """
        model = self._models.get(model_index)
        if model is None or model.removed:
            raise ValueError(f"set_workers: model {model_index} is not loaded in this batcher; send load_model first")
        ids = set()
        for each in wanted:
            worker_id = each.worker_id
            ids.add(worker_id)
            worker = self._workers.get(worker_id)
            if worker is None:
                worker = Worker(worker_id, model, each.gpu_id, each.devices, self._wall_ms())
                self._workers[worker_id] = worker
                self._start(worker, now)
            elif worker.model is not model:
                raise ValueError(f"set_workers: worker {worker_id} belongs to model {worker.model_index}")
            worker.wanted = True
        for worker in list(self._workers.values()):
            if worker.model is model and worker.wanted and worker.worker_id not in ids:
                self._dismiss(worker, now)
        return self._take_actions()

    def remove_model(self, model_index: int, now: float) -> list[Action]:
        """Stops all workers of a model; `ModelUnloaded` follows when the last is gone."""
        model = self._models.get(model_index)
        if model is None:
            return [ModelUnloaded(model_index)]
        model.removed = True
        for worker in [each for each in self._workers.values() if each.model is model]:
            self._dismiss(worker, now)
        self._forget_model_if_done(model)
        return self._take_actions()

    def stop(self, now: float) -> list[Action]:
        """Stops every worker, each after its batch; nothing is started any more. Over when `idle`."""
        self._stopping = True
        for worker in list(self._workers.values()):
            self._dismiss(worker, now)
        return self._take_actions()

    @property
    def idle(self) -> bool:
        """True when no worker has a process."""
        return not any(worker.state in HAS_PROCESS for worker in self._workers.values())

    def on_template_event(self, event: FromTemplate, now: float) -> list[Action]:
        """Takes what the worker template says of itself and its workers."""
        if isinstance(event, messages.TemplateStarted):
            self._template.started = True
            self._start_waiting(now)
        elif isinstance(event, messages.TemplateReady):
            self._template.note_ready(now)
            self._start_waiting(now)
        elif not isinstance(event, messages.MetricsReported):
            worker = self._live(event.worker_id, event.start_count)
            if worker is None or worker.state not in HAS_PROCESS:
                return self._take_actions()
            match event:
                case messages.WorkerStarted():
                    self._started(worker, event.pid, now)
                case messages.WorkerProgress():
                    worker.progress = event.text
                    self._say(worker)
                case messages.WorkerLoaded():
                    self._loaded(worker, event, now)
                case messages.WorkerExited():
                    self._exited(worker, event, now)
        return self._take_actions()

    def on_template_lost(self, now: float) -> list[Action]:
        """The template's channel is closed: it is dead, and all its workers with it."""
        delay = self._template.note_death(now)
        log.error("The worker template died; starting another in %d seconds.", delay)
        self._lose_all(now)
        return self.tick(now)

    def worker_not_started(self, worker_id: int, start_count: int, reason: str, now: float) -> list[Action]:
        """A StartWorker could not be carried out for lack of memory; `reason` is for the operator."""
        worker = self._live(worker_id, start_count)
        if worker is not None and worker.state is WorkerState.STARTING:
            self._gone(worker, "oom", reason, now, blame=True)
        return self._take_actions()

    def worker_released(self, worker_id: int, start_count: int, now: float) -> list[Action]:
        """The worker named by a ReleaseWorker has finished its last batch and has been asked to leave."""
        worker = self._live(worker_id, start_count)
        if worker is not None and worker.state is WorkerState.RELEASING:
            worker.begin(WorkerState.ENDING, now + EXIT_GRACE_S)
        return self._take_actions()

    def worker_timed_out(self, worker_id: int, start_count: int, now: float) -> list[Action]:
        """The worker has not answered a batch within its model's response timeout: kills it."""
        worker = self._live(worker_id, start_count)
        if worker is not None and worker.state in (WorkerState.READY, WorkerState.RELEASING):
            self._timed_out(worker, f"no answer within {worker.model.spec.response_timeout_s:g} s", now)
        return self._take_actions()

    def tick(self, now: float) -> list[Action]:
        """Does what has become due."""
        if now >= self._template.deadline and not self._stopping:
            # One that hangs may have started those that need not wait for it; they go with it.
            self._lose_all(now)
            self._start_template(now)
        for worker in [each for each in self._workers.values() if each.deadline <= now]:
            self._due(worker, now)
        return self._take_actions()

    @property
    def next_wake_at(self) -> float:
        """The monotonic time at which `tick` has something to do; infinity when nothing is pending."""
        due = min((worker.deadline for worker in self._workers.values()), default=math.inf)
        return due if self._stopping else min(due, self._template.deadline)

    def _start_template(self, now: float) -> None:
        self._template.deadline = now + TEMPLATE_TIMEOUT_S
        self._actions.append(StartTemplate())

    def _lose_all(self, now: float) -> None:
        """The template's end is that of all its workers."""
        self._template.started = self._template.ready = False
        for worker in [each for each in self._workers.values() if each.state in HAS_PROCESS]:
            reason = worker.fault or "the worker template died"
            self._gone(worker, "died", reason, now, blame=bool(worker.fault))

    def _start_waiting(self, now: float) -> None:
        for worker in self._workers.values():
            if worker.state is WorkerState.WAITING and self._template.can_start(worker.model.spec):
                self._start(worker, now)

    def _start(self, worker: Worker, now: float) -> None:
        """Starts a worker, or lets it wait for the template."""
        worker.pid, worker.stopping, worker.killed, worker.fault = -1, False, False, ""
        worker.progress, worker.ready_at = "", math.inf
        spec = worker.model.spec
        if self._template.can_start(spec):
            worker.start_count += 1
            worker.begin(WorkerState.STARTING, now + START_TIMEOUT_S)
            self._actions.append(StartWorker(worker.worker_id, worker.start_count, spec, worker.gpu_id, worker.devices))
        else:
            worker.begin(WorkerState.WAITING, now + TEMPLATE_TIMEOUT_S)
        self._say(worker)

    def _started(self, worker: Worker, pid: int, now: float) -> None:
        worker.pid = pid
        if worker.state is WorkerState.STARTING:
            worker.begin(WorkerState.LOADING, now + worker.model.spec.startup_timeout_s)
            worker.log_change("WORKER_STARTED")
            self._say(worker)

    def _loaded(self, worker: Worker, event: messages.WorkerLoaded, now: float) -> None:
        if worker.state is not WorkerState.LOADING:
            return
        worker.load_status, worker.load_ms = event.status, event.load_ms
        worker.progress = ""
        worker.model.timeouts_in_a_row = 0
        if worker.load_status != HTTP_OK:
            worker.fault = f"the model could not be loaded: {event.message}"
            worker.begin(WorkerState.ENDING, now + EXIT_GRACE_S)
            worker.log_change("WORKER_ERROR")
            return
        worker.begin(WorkerState.READY)
        worker.ready_at = now
        worker.log_change("WORKER_MODEL_LOADED")
        if worker.model.spec.async_communication:
            worker.log(logging.INFO, "Worker loaded the model successfully")
        if worker.recovering_since is not None:
            worker.log(logging.INFO, "Auto recovery succeeded, reset recoveryStartTS")
        worker.recovering_since, worker.failures = None, 0
        self._actions.append(WorkerReady(worker.worker_id, worker.model_index, worker.start_count))
        self._say(worker)

    def _exited(self, worker: Worker, event: messages.WorkerExited, now: float) -> None:
        worker.last_lines = event.last_lines
        cause, reason = judge_exit(worker, event.code, event.signal)
        if cause == "stopped":
            worker.log(logging.INFO, "Worker terminated due to scale-down call.")
        self._gone(worker, cause, reason, now, blame=cause != "stopped")

    def _gone(self, worker: Worker, cause: Cause, reason: str, now: float, *, blame: bool) -> None:
        """The process of a worker is gone; what comes next depends on whether the worker is to blame."""
        if cause != "stopped":
            worker.log(logging.INFO, "%d Worker disconnected. %s", worker.worker_id, worker.log_state)
            worker.log(logging.INFO, "%d Worker ended: %s.", worker.worker_id, reason)
        if blame and worker.state in BEFORE_READY:
            worker.load_status = HTTP_OUT_OF_MEMORY if cause == "oom" else HTTP_ERROR
        worker.log_change("WORKER_SCALED_DOWN" if cause == "stopped" else "WORKER_STOPPED")
        worker.pid, worker.exit_reason = -1, reason
        worker.restart_reason = restart_reason(worker, cause, blame=blame)
        self._actions.append(WorkerGone(worker.worker_id, worker.start_count, cause))
        if not worker.wanted:
            self._forget(worker)
        elif blame:
            self._failed(worker, now)
        else:
            self._start(worker, now)

    def _failed(self, worker: Worker, now: float) -> None:
        """Plans the next start after a failure, or gives up."""
        if worker.recovering_since is None:
            worker.recovering_since = now
            worker.log(logging.INFO, "Auto recovery start timestamp: %d", self._wall_ms())
        else:
            worker.log(logging.WARNING, "Auto recovery failed again")
        if now - worker.recovering_since < worker.model.spec.max_retry_timeout_s:
            worker.failures += 1
            delay = restart_delay_s(worker, now)
            worker.begin(WorkerState.BACKOFF, now + delay)
            worker.log(logging.INFO, "Retry worker: %d in %d seconds.", worker.worker_id, delay)
        else:
            worker.begin(WorkerState.FAILED)
            worker.log(logging.ERROR, "%d Worker given up: %s.", worker.worker_id, worker.exit_reason)
        self._say(worker)

    def _due(self, worker: Worker, now: float) -> None:
        """Does what a state does at its deadline."""
        spec = worker.model.spec
        if worker.state is WorkerState.BACKOFF:
            self._start(worker, now)
        elif worker.state is WorkerState.WAITING:
            worker.exit_reason = f"the worker template did not start within {TEMPLATE_TIMEOUT_S:g} s"
            worker.load_status = HTTP_TIMEOUT
            self._failed(worker, now)
        elif worker.state is WorkerState.STARTING:
            self._timed_out(worker, f"the process did not start within {START_TIMEOUT_S:g} s", now)
        elif worker.state is WorkerState.LOADING:
            if spec.async_communication:
                worker.log(logging.ERROR, "Worker did not load the model within %g seconds", spec.startup_timeout_s)
            self._timed_out(worker, f"did not load the model within {spec.startup_timeout_s:g} s", now)
        elif worker.state is WorkerState.RELEASING:
            self._timed_out(worker, f"no answer within {spec.response_timeout_s:g} s", now)
        elif worker.state is WorkerState.ENDING:
            self._kill(worker, now)

    def _timed_out(self, worker: Worker, fault: str, now: float) -> None:
        worker.model.timeouts_in_a_row += 1
        count = worker.model.timeouts_in_a_row
        worker.log(logging.ERROR, "Number or consecutive unsuccessful inference %d", count)
        worker.log(logging.ERROR, "Backend worker error", cause=_NO_RESPONSE)
        if worker.state in BEFORE_READY:
            worker.load_status = HTTP_TIMEOUT
        worker.fault = fault
        self._kill(worker, now)

    def _dismiss(self, worker: Worker, now: float) -> None:
        """Lets a worker go that is no longer wanted."""
        worker.wanted = False
        if worker.state is WorkerState.READY:
            worker.stopping = True
            worker.begin(WorkerState.RELEASING, now + worker.model.spec.response_timeout_s + RELEASE_MARGIN_S)
            self._actions.append(messages.ReleaseWorker(worker.worker_id, worker.start_count))
        elif worker.state in BEFORE_READY:
            worker.stopping = True
            self._kill(worker, now)
        elif worker.state not in HAS_PROCESS:
            self._forget(worker)

    def _kill(self, worker: Worker, now: float) -> None:
        worker.killed = True
        worker.begin(WorkerState.ENDING, now + KILL_REPEAT_S)
        self._actions.append(KillWorker(worker.worker_id, worker.start_count))

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.worker_id]
        self._actions.append(worker.report(WorkerState.STOPPED))
        self._forget_model_if_done(worker.model)

    def _forget_model_if_done(self, model: Model) -> None:
        index = model.spec.index
        if model.removed and not any(each.model is model for each in self._workers.values()):
            if self._models.get(index) is model:
                del self._models[index]
            self._actions.append(ModelUnloaded(index))

    def _live(self, worker_id: int, start_count: int) -> Worker | None:
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.start_count == start_count else None

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _say(self, worker: Worker) -> None:
        self._actions.append(worker.report())
