"""What can be asked for over the control socket, but for those on models and workflows (their managers)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from wsgi_ts.control.server import Operation, Peer
from wsgi_ts.errors import BadRequest, InternalServerError, ModelNotFound, ServiceUnavailable
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.queries import ModelQueries
from wsgi_ts.models.registry import Registry
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.security.tokens import INFERENCE, MANAGEMENT, KeyFileError, KeyRing
from wsgi_ts.supervisor.console import ConsoleData
from wsgi_ts.supervisor.loop import MainLoop
from wsgi_ts.supervisor.metrics.collector import MetricsCollector
from wsgi_ts.supervisor.segments import Segments
from wsgi_ts.tracing.store import TraceStore
from wsgi_ts.workflows.manager import WorkflowManager

log = logging.getLogger(__name__)

#: How long an answer waits for the batchers to attach a segment, in seconds.
_ATTACH_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class ControlOperations:
    """The operations by name, each called on the thread of the connection that asks for it.

    Attributes:
        loop: the main thread, which owns the segments and knows the status.
        registry: tells whether the instance is stopping.
        keys: the tokens; None where requests need none.
        status: what `wsgi-ts status` shows; called on the main thread.
        stop: counts so many requests to stop (two: at once); called on the main thread.
        traces: what is kept of requests.
        replace: has another program, with another configuration, take this supervisor's place; likewise.
    """

    loop: MainLoop
    registry: Registry
    manager: ModelManager
    queries: ModelQueries
    workflows: WorkflowManager
    metrics: MetricsCollector
    console: ConsoleData
    segments: Segments
    keys: KeyRing | None
    status: Callable[[], dict[str, Any]]
    stop: Callable[[int], None]
    replace: Callable[[list[str], str, dict[str, str]], None]
    traces: TraceStore

    def table(self) -> dict[str, Operation]:
        """All operations, for `ControlServer`."""
        manager = self.manager
        return {
            "register_model": Operation(manager.register),
            "scale_model": Operation(manager.scale),
            "describe_model": Operation(self.queries.describe),
            "list_models": Operation(self.queries.list_models),
            "set_default": Operation(manager.set_default),
            "unregister_model": Operation(manager.unregister),
            "kserve_ready": Operation(self._kserve_ready),
            "register_workflow": Operation(self.workflows.register),
            "describe_workflow": Operation(self.workflows.describe),
            "list_workflows": Operation(self.workflows.list_workflows),
            "unregister_workflow": Operation(self.workflows.unregister),
            "begin_trial": Operation(manager.trials.begin, told_peer=True),
            "change_trial": Operation(manager.trials.change, told_peer=True),
            "end_trial": Operation(manager.trials.end, told_peer=True),
            "batch_counts": Operation(self._batch_counts),
            "metrics": Operation(self.metrics.text),
            "list_traces": Operation(self.traces.newest),
            "find_trace": Operation(self.traces.find),
            "explain": Operation(self.traces.explain),
            "console_snapshot": Operation(self.console.snapshot),
            "console_settings": Operation(self.console.settings),
            "renew_token": Operation(self._renew_token),
            "new_segment": Operation(self._new_segment, told_peer=True),
            "segment_ready": Operation(self._segment_ready, told_peer=True),
            "status": Operation(lambda: self.loop.call(self.status)),
            "replace": Operation(self._request_replacement, told_peer=True),
            "stop": Operation(self._request_stop, told_peer=True),
        }

    def _kserve_ready(self, *, model_name: str) -> Any:
        try:
            return self.queries.kserve_ready(model_name=model_name)
        except ModelNotFound:
            ready = self.workflows.is_ready(model_name)
            if ready is None:
                raise
        return {"status": 200, "body": {"name": model_name, "ready": ready}}

    def _batch_counts(self, *, model_name: str, version: str | None = None) -> Any:
        return self.metrics.batch_counts(self.registry.get(model_name, version))

    def _new_segment(self, *, peer: Peer, pid: int) -> Any:
        if pid != peer.pid:
            raise BadRequest("A process asks for its own segment only.")
        if self.registry.draining:
            raise ServiceUnavailable("The server is stopping.")
        return self.loop.call(lambda: self.segments.new(peer.pid))

    def _segment_ready(self, *, peer: Peer, index: int) -> Any:
        attached = threading.Event()
        self.loop.call(lambda: self.segments.ready(index, peer.pid, attached.set))
        if not attached.wait(_ATTACH_LIMIT_S):
            raise InternalServerError("The batchers did not attach the segment in time.")
        return {}

    def _renew_token(self, *, scope: str) -> Any:
        if self.keys is None or scope not in (MANAGEMENT, INFERENCE):
            raise BadRequest("There is no such token.")
        try:
            self.keys.renew(scope)
        except KeyFileError as error:
            log.error("%s", error)
            raise InternalServerError("The new token could not be written; the old one still counts.") from error
        return {}

    def _request_replacement(self, *, peer: Peer, command: list[str], config: str, fixed: dict[str, str]) -> Any:
        log.info("Process %d asks for an upgrade to %s", peer.pid, command[0] if command else "nothing")
        self.loop.call(lambda: self.replace(command, config, fixed))
        return {}

    def _request_stop(self, *, peer: Peer, fast: bool = False) -> Any:
        count = 2 if fast else 1
        log.info("Process %d asks for a stop", peer.pid)
        self.loop.post(lambda: self.stop(count))
        return {}
