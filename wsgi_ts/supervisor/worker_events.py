"""From what batchers report of model workers to the events that plugins are told of."""

from __future__ import annotations

from wsgi_ts.messages import WorkerReport, WorkerState
from wsgi_ts.models.registry import Registry
from wsgi_ts.plugins.events import Events


class WorkerEvents:
    """Remembers what each worker was, and tells what has become of it. For the supervisor's main thread."""

    def __init__(self, events: Events, registry: Registry) -> None:
        self._events = events
        self._registry = registry
        self._pids: dict[int, int] = {}
        self._ready: dict[int, set[int]] = {}

    def reported(self, report: WorkerReport) -> None:
        """A batcher has told of a worker."""
        if not self._events.is_on:
            return
        model = self._registry.by_index(report.model_index)
        if model is None:
            return
        what = {"name": model.name, "version": model.version}
        worker_id, pid = report.worker_id, report.pid
        before = self._pids.get(worker_id, -1)
        if pid > 0 and pid != before:
            self._pids[worker_id] = pid
            self._events.tell("worker_started", **what, worker_id=worker_id, pid=pid)
        if before > 0 and pid != before:
            if report.state not in (WorkerState.STOPPED, WorkerState.RELEASING, WorkerState.ENDING):
                last = list(report.last_lines)
                self._events.tell(
                    "worker_died", **what, worker_id=worker_id, reason=report.exit_reason, last_lines=last
                )
            if pid <= 0:
                self._pids.pop(worker_id, None)
        ready = self._ready.setdefault(report.model_index, set())
        were_ready = bool(ready)
        if report.state == WorkerState.READY:
            ready.add(worker_id)
        else:
            ready.discard(worker_id)
        if bool(ready) != were_ready:
            self._events.tell("model_ready" if ready else "model_unready", **what)
