"""The story of one request as a record: plain data, the same for what is kept, for the console and for spans.

It is made by the process that has answered the request, of times that were noted anyway: when it came and was
submitted, and what its slot says of the batch that it was run in. Who shared that batch its model worker alone knows,
whose records are put together with these where somebody asks (`wsgi_ts.tracing.store`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from wsgi_ts.batcher.shm.request_codec import Times
from wsgi_ts.tracing.context import TraceContext
from wsgi_ts.tracing.records import REQUEST, batch_key, reason_name


class Told(NamedTuple):
    """What the process that answers a request knows of it.

    Attributes:
        request_id: its id.
        model, version: where it went; of a workflow its name, and no version.
        protocol: http, grpc or workflow.
        method, path: as the client has sent them.
        status: that it was answered with, as HTTP knows it.
        error: what the client was told is wrong; None where nothing is.
        arrived_ns, submitted_ns, answered_ns: monotonic; submitted is 0 where it was refused before that.
        times: of its run; None where it was not answered from a slot, or not by one run.
        nodes: of a workflow, what is told of each run of a node.
        trace: its place in a trace that is recorded.
        parent: the client's span, where the client has sent one.
        left_in: where it was when nobody waited for it any more, QUEUED or RUNNING; empty where it was answered.
        peer: the client, `/address:port`.
        head: of HTTP, request line and header lines, where the trace is recorded.
        is_tls: it came over TLS.
    """

    request_id: str
    model: str
    version: str | None
    protocol: str
    method: str
    path: str
    status: int
    error: str | None
    arrived_ns: int
    submitted_ns: int
    answered_ns: int
    times: Times | None = None
    nodes: Sequence[NodeRun] = ()
    trace: TraceContext | None = None
    parent: str = ""
    left_in: str = ""
    peer: str = ""
    head: str = ""
    is_tls: bool = False

    @classmethod
    def from_json(cls, fields: list[Any]) -> Told:
        """Returns what was told, of the list that JSON has made of it."""
        fields[_TIMES] = _times(fields[_TIMES])
        fields[_NODES] = [NodeRun(*run)._replace(times=_times(run[-1])) for run in fields[_NODES]]
        fields[_TRACE] = None if fields[_TRACE] is None else TraceContext(*fields[_TRACE])
        return cls(*fields)


class NodeRun(NamedTuple):
    """One run of a workflow's node.

    Attributes:
        name: the node.
        item: the element's number, -1 where the node runs once.
        began_ns: monotonic.
        took_ns: how long.
        outcome: what became of it, in one word.
        attempt: which attempt that was.
        model, version: what it asks; the version is None for the default one.
        times: of the last attempt; None where it has no answer.
    """

    name: str
    item: int
    began_ns: int
    took_ns: int
    outcome: str
    attempt: int
    model: str
    version: str | None
    times: Times | None


#: What is told of a part that there is nothing to be told of.
_NOTHING: Final[Mapping[str, Any]] = {}


class Part:
    """One part of a request.

    Attributes:
        name: what went on.
        begin_ns, end_ns: from when to when (monotonic).
        attributes: what else is told of it; not to be changed.
        run: of a batch, how that was run.
    """

    __slots__ = ("attributes", "begin_ns", "end_ns", "name", "run")

    def __init__(
        self,
        name: str,
        begin_ns: int,
        end_ns: int,
        attributes: Mapping[str, Any] = _NOTHING,
        run: Times | None = None,
    ) -> None:
        self.name = name
        self.begin_ns = begin_ns
        self.end_ns = end_ns
        self.attributes = attributes
        self.run = run


#: Where in `Told` what JSON knows as lists lies.
_TIMES, _NODES, _TRACE = (Told._fields.index(name) for name in ("times", "nodes", "trace"))


def request_record(told: Told, kept_because: str) -> dict[str, Any]:
    """Returns a request's record: the fields that `GET /debug/traces` shows, and of its batch the key."""
    times = run_of(told)
    now_ns = time.monotonic_ns()
    record: dict[str, Any] = {
        "kind": REQUEST,
        "request_id": told.request_id,
        "trace_id": told.trace.trace_id if told.trace is not None else None,
        "model": told.model,
        "version": told.version,
        "protocol": told.protocol,
        "method": told.method,
        "path": told.path,
        "status": told.status,
        "error": told.error,
        "started": time.time() - (now_ns - told.arrived_ns) / 1e9,
        "duration_ms": _ms(told.arrived_ns, told.answered_ns),
        "kept_because": kept_because,
        "batch_size": times.size if times is not None else None,
        "batch_close_reason": reason_name(times.reason) if times is not None else None,
        "worker": times.worker if times is not None else None,
        "spans": [_shown(part, told.arrived_ns) for part in parts_of(told)],
    }
    if times is not None:
        record["batch"] = batch_key(times.worker, times.number, times.posted_ns)
    return record


def run_of(told: Told) -> Times | None:
    """Returns the times of the one run that has answered a request; None where none has."""
    return told.times if told.times is not None and told.times.posted_ns else None


def _times(fields: Any) -> Times | None:
    return None if fields is None else Times(*fields)


def _ms(from_ns: int, to_ns: int) -> float:
    return round(max(0, to_ns - from_ns) / 1e6, 3)


def _shown(part: Part, origin_ns: int) -> dict[str, Any]:
    """Returns a part as the record has it; `origin_ns` is when the request came."""
    return {
        "name": part.name,
        "start_ms": round((part.begin_ns - origin_ns) / 1e6, 3),
        "duration_ms": _ms(part.begin_ns, part.end_ns),
        "attributes": dict(part.attributes),
    }


def parts_of(told: Told) -> list[Part]:
    """Returns the parts of a request, by their begin."""
    if not told.submitted_ns:
        return [Part("receive", told.arrived_ns, told.answered_ns)]
    parts = [Part("receive", told.arrived_ns, told.submitted_ns)]
    times = run_of(told)
    if told.nodes:
        for node in told.nodes:
            parts += _node_parts(node)
    elif times is None:
        attributes = {"state": told.left_in} if told.left_in else {}
        parts.append(Part("wait", told.submitted_ns, told.answered_ns, attributes))
    else:
        parts += _run_parts(times, told.submitted_ns, told.answered_ns)
        if times.ended_ns:
            parts.append(Part("respond", times.ended_ns, told.answered_ns))
    return parts


def _run_parts(times: Times, submitted_ns: int, until_ns: int) -> list[Part]:
    """Returns the parts of a run: the wait in the queue, the batch, and the handler's stages within it.

    `until_ns` is the end, where a streamed answer goes on.
    """
    batch = {
        "batch.size": times.size,
        "batch.close_reason": reason_name(times.reason),
        "batch.number": times.number,
        "worker": times.worker,
    }
    posted_ns = times.posted_ns
    parts = [Part("queue", submitted_ns, posted_ns), Part("batch", posted_ns, times.ended_ns or until_ns, batch, times)]
    if times.started_ns > posted_ns:
        parts.append(Part("handover", posted_ns, times.started_ns))
    for name, begin_ns, end_ns in times.stages():
        parts.append(Part(name, begin_ns, end_ns))
    return parts


def run_fields(times: Times | None, submitted_ns: int) -> dict[str, Any]:
    """Returns what a log line says of a run; nothing for a request that no worker has run.

    `submitted_ns` is when it was submitted (monotonic).
    """
    if times is None or not times.posted_ns:
        return {}
    return {
        "batch_size": times.size,
        "batch_close_reason": reason_name(times.reason),
        "queue_ms": _ms(submitted_ns, times.posted_ns),
        "infer_ms": _ms(times.started_ns, times.ended_ns) if times.ended_ns else None,
        "worker": times.worker,
    }


def _node_parts(node: NodeRun) -> list[Part]:
    """Returns the part of a workflow's request that a node was, and the parts of that."""
    attributes: dict[str, Any] = {"outcome": node.outcome, "attempt": node.attempt}
    if node.item >= 0:
        attributes["item"] = node.item
    inner: list[Part] = []
    end_ns = node.began_ns + node.took_ns
    if node.times is not None and node.times.posted_ns:
        inner = _run_parts(node.times, node.began_ns, end_ns)
        attributes |= inner[1].attributes
        for part in inner:
            part.attributes = {**part.attributes, "node": node.name}
    return [Part(f"node {node.name}", node.began_ns, end_ns, attributes), *inner]
