"""The story of one request as a record: plain data, the same for what is kept, for the console and for spans.

It is made by the process that has answered the request, of times that were noted anyway: when it came and was
submitted, and what its slot says of the batch that it was run in. Who shared that batch its model worker alone knows,
whose records are put together with these where somebody asks (`wsgi_ts.tracing.store`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from wsgi_ts.batcher.shm.request_codec import Times
from wsgi_ts.dataplane.http_facts import http_facts
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
        told = cls(*fields)
        return told._replace(
            times=_times(told.times),
            nodes=[NodeRun(*run)._replace(times=_times(run[-1])) for run in told.nodes],
            trace=None if told.trace is None else TraceContext(*told.trace),
        )


class NodeRun(NamedTuple):
    """One run of a workflow's node.

    Attributes:
        name: the node.
        item: the element's number, -1 where the node runs once.
        began_ns: monotonic.
        took_ns: how long.
        outcome: what became of it, in one word.
        attempt: which attempt that was.
        times: of the last attempt; None where it has no answer.
    """

    name: str
    item: int
    began_ns: int
    took_ns: int
    outcome: str
    attempt: int
    times: Times | None


def request_record(told: Told, kept_because: str) -> dict[str, Any]:
    """Returns a request's record: the fields that `GET /debug/traces` shows, and some more for spans."""
    times = told.times if told.times is not None and told.times.posted_ns else None
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
        "spans": _spans(told, times),
    }
    if times is not None:
        record["batch"] = batch_key(times.worker, times.number, times.posted_ns)
    if told.trace is not None:
        record["span_id"], record["parent_id"] = told.trace.span_id, told.parent
        record["trace_state"], record["attributes"] = told.trace.state, _attributes(told)
    return record


def _attributes(told: Told) -> dict[str, Any]:
    if told.protocol == "grpc":
        return {"rpc.system.name": "grpc", "rpc.method": told.path.lstrip("/")}
    is_workflow = told.protocol == "workflow"
    return http_facts(told.head, told.peer, is_tls=told.is_tls, name=told.model, is_workflow=is_workflow)


def _times(fields: Any) -> Times | None:
    return None if fields is None else Times(*fields)


def _ms(from_ns: int, to_ns: int) -> float:
    return round(max(0, to_ns - from_ns) / 1e6, 3)


def _spans(told: Told, times: Times | None) -> list[dict[str, Any]]:
    """Returns the parts of a request, by their begin."""
    origin = told.arrived_ns
    if not told.submitted_ns:
        return [span("receive", origin, origin, told.answered_ns)]
    spans = [span("receive", origin, origin, told.submitted_ns)]
    if told.nodes:
        for node in told.nodes:
            spans += _node_spans(node, origin)
    elif times is None:
        attributes = {"state": told.left_in} if told.left_in else {}
        spans.append(span("wait", origin, told.submitted_ns, told.answered_ns, **attributes))
    else:
        spans += run_spans(times, origin, told.submitted_ns, told.answered_ns)
        if times.ended_ns:
            spans.append(span("respond", origin, times.ended_ns, told.answered_ns))
    return spans


def span(name: str, origin_ns: int, from_ns: int, to_ns: int, **attributes: Any) -> dict[str, Any]:
    """Returns one part of a request, as the record has it.

    All times are monotonic: `origin_ns` is when the request came.
    """
    start_ms = round((from_ns - origin_ns) / 1e6, 3)
    return {"name": name, "start_ms": start_ms, "duration_ms": _ms(from_ns, to_ns), "attributes": attributes}


def run_spans(times: Times, origin_ns: int, submitted_ns: int, until_ns: int) -> list[dict[str, Any]]:
    """Returns the parts of a run: the wait in the queue, the batch, and the handler's stages within it.

    `until_ns` is the end, where a streamed answer goes on.
    """
    ended_ns = times.ended_ns or until_ns
    posted_ns = times.posted_ns
    batch = {
        "batch.size": times.size,
        "batch.close_reason": reason_name(times.reason),
        "batch.number": times.number,
        "worker": times.worker,
    }
    spans = [
        span("queue", origin_ns, submitted_ns, posted_ns),
        span("batch", origin_ns, posted_ns, ended_ns, **batch),
    ]
    if times.started_ns > posted_ns:
        spans.append(span("handover", origin_ns, posted_ns, times.started_ns))
    spans += [span(name, origin_ns, begin_ns, end_ns) for name, begin_ns, end_ns in times.stages()]
    return spans


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


def _node_spans(node: NodeRun, origin_ns: int) -> list[dict[str, Any]]:
    """Returns the part of a workflow's request that a node was, and the parts of that."""
    attributes: dict[str, Any] = {"outcome": node.outcome, "attempt": node.attempt}
    if node.item >= 0:
        attributes["item"] = node.item
    inner: list[dict[str, Any]] = []
    if node.times is not None and node.times.posted_ns:
        inner = run_spans(node.times, origin_ns, node.began_ns, node.began_ns + node.took_ns)
        attributes |= inner[1]["attributes"]
        for each in inner:
            each["attributes"] = {**each["attributes"], "node": node.name}
    return [span(f"node {node.name}", origin_ns, node.began_ns, node.began_ns + node.took_ns, **attributes), *inner]
