"""What is told of a gRPC call for its trace, from its begin in `AsyncPlane` to its end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.request_traces import RequestTraces, error_text
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.stories import Told, run_fields
from wsgi_ts.errors import ServerError
from wsgi_ts.tracing.context import TraceContext

#: What a client has sent beside its message.
Metadata = Iterable[tuple[str, str | bytes]]


class CallTrace:
    """The trace of one call.

    Attributes:
        head: what its handler sees of headers, with its place in a trace, where spans are made.
        flags: RequestFlag bits for its request.
        submitted_ns: when it was submitted (monotonic), 0 before.
        slot: where its answer was read from, -1 for nowhere.
        walk: of a workflow, its way through the nodes, once it is answered.
    """

    __slots__ = (
        *("_arrived_ns", "_parent", "_target", "_trace", "_traces"),
        *("flags", "head", "slot", "submitted_ns", "walk"),
    )

    def __init__(self, traces: RequestTraces, target: Target, head: bytes, metadata: Metadata) -> None:
        self._traces = traces
        self._target = target
        self._arrived_ns = time.monotonic_ns()
        self._trace: TraceContext | None = None
        self._parent = ""
        self.head = head
        self.flags = 0
        self.submitted_ns = 0
        self.slot = -1
        self.walk: Any = None
        if traces.has_spans:
            parents, states = (_values(metadata, name) for name in ("traceparent", "tracestate"))
            parent = None if not parents else parents[0] if len(parents) == 1 else b""
            self.head, self._trace, self._parent = traces.begin(head, parent, b",".join(states))
            self.flags = RequestFlag.SAMPLED if self._trace is not None else 0

    def log_fields(self) -> dict[str, Any]:
        """What a log line says of it."""
        target, trace = self._target, self._trace
        times = self._traces.times_of(self.slot) if target.graph is None else None
        return {
            "trace_id": trace.trace_id if trace is not None else None,
            "span_id": trace.span_id if trace is not None else None,
            "model": target.model_name if target.graph is None else target.graph.name,
            "version": target.version,
            **run_fields(times, self.submitted_ns),
        }

    def end(self, request_id: str, error: ServerError | None) -> None:
        """Notes the call's end.

        `error` says why it has no answer; None where it has one.
        """
        now_ns = time.monotonic_ns()
        traces, target = self._traces, self._target
        name = target.model_name if target.graph is None else target.graph.name
        status = 200 if error is None else error.status
        traces.slowest.look(now_ns / 1e9)
        if not traces.is_worth_it(name, status, now_ns - self._arrived_ns, self._trace):
            return
        traces.tell(
            Told(
                request_id=request_id,
                model=name,
                version=traces.version_of(target),
                protocol="grpc",
                method="POST",
                path=self.head.partition(b"\r\n")[0].decode("latin-1").split(" ")[1],
                status=status,
                error=error_text(error),
                arrived_ns=self._arrived_ns,
                submitted_ns=self.submitted_ns,
                answered_ns=now_ns,
                times=traces.times_of(self.slot) if target.graph is None else None,
                nodes=traces.node_runs(self.walk) if self.walk is not None else (),
                trace=self._trace,
                parent=self._parent,
            )
        )


def _values(metadata: Metadata, wanted: str) -> list[bytes]:
    return [value.encode("latin-1") if isinstance(value, str) else value for name, value in metadata if name == wanted]
