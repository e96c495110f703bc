"""What is told of a request that a web worker has answered, for its trace."""

from __future__ import annotations

from typing import Any

from wsgi_ts.batcher.shm.request_codec import read_times
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.dataplane.request_traces import RequestTraces, error_text
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.stories import Told, run_fields
from wsgi_ts.logs.request_line import request_line
from wsgi_ts.logs.text import mask_secrets
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.connection import Connection

#: The longest path and name of a client's program that a record holds.
_MOST_TEXT = 512
#: What stands behind a model in a path and is no version.
_VERBS = ("predict", "invoke", "infer", "explain")
_MOST_PARTS = 6


def told_of(traces: RequestTraces, connection: Connection, target: Target, status: int, took_ns: int) -> Told:
    """Returns what is known of the request under way, which is being answered.

    Args:
        traces: read how it was run.
        connection: has it.
        target: where it went.
        status: that it is answered with.
        took_ns: how long it has taken.
    """
    head = connection.head
    graph = target.graph
    return Told(
        request_id=connection.request_id,
        model=target.model_name if graph is None else graph.name,
        version=traces.version_of(target),
        protocol="http" if graph is None else "workflow",
        method=head.method if head is not None else "",
        path=head.path[:_MOST_TEXT] if head is not None else "",
        status=status,
        error=error_text(connection.fault),
        arrived_ns=connection.arrival_ns,
        submitted_ns=connection.submitted_ns,
        answered_ns=connection.arrival_ns + took_ns,
        times=traces.times_of(connection.answered_slot) if graph is None else None,
        nodes=traces.node_runs(connection.walk) if connection.walk is not None else (),
        trace=connection.trace,
        parent=connection.parent,
        attributes=_attributes(connection, target),
        left_in=connection.left_in,
    )


def json_line(segment: Segment | None, connection: Connection, status: int, took_ns: int) -> str:
    """Returns the line of the access log for the request under way, which is being answered.

    Args:
        segment: where it lies; None where no predictions are served.
        connection: has it.
        status: that it is answered with.
        took_ns: how long it has taken.
    """
    head, target, trace = connection.head, connection.target, connection.trace
    graph = target.graph if target is not None else None
    slot = connection.answered_slot
    times = read_times(segment, slot) if segment is not None and slot >= 0 and graph is None else None
    address, _, port = connection.peer.lstrip("/").rpartition(":")
    return request_line(
        took_ns,
        request_id=connection.request_id,
        trace_id=trace.trace_id if trace is not None else None,
        span_id=trace.span_id if trace is not None else None,
        http__request__method=head.method if head is not None else None,
        url__path=head.path[:_MOST_TEXT] if head is not None else None,
        http__response__status_code=status,
        client__address=address,
        client__port=int(port) if port.isdigit() else None,
        model=(target.model_name if graph is None else graph.name) if target is not None else None,
        version=target.version if target is not None else None,
        error__message=error_text(connection.fault),
        **run_fields(times, connection.submitted_ns),
    )


def _attributes(connection: Connection, target: Target) -> dict[str, Any]:
    """The facts of HTTP, by OpenTelemetry's names."""
    head = connection.head
    address, _, port = connection.peer.lstrip("/").rpartition(":")
    found: dict[str, Any] = {
        "url.scheme": "https" if isinstance(connection.sock, TlsSocket) else "http",
        "client.address": address,
        "client.port": int(port) if port.isdigit() else 0,
    }
    if head is None:
        return found
    environ = head.environ
    host, _, server_port = environ.get("HTTP_HOST", "").partition(":")
    found["network.protocol.version"] = "1.1" if head.http_1_1 else "1.0"
    found["http.route"] = route_of(head.path, target)
    found["server.address"] = host
    if server_port.isdigit():
        found["server.port"] = int(server_port)
    agent = environ.get("HTTP_USER_AGENT", "")
    if agent:
        found["user_agent.original"] = agent[:_MOST_TEXT]
    if head.query:
        found["url.query"] = mask_secrets(f"?{head.query}")[1:][:_MOST_TEXT]
    return found


def route_of(path: str, target: Target) -> str:
    """The route of a prediction's path: what varies has a name instead of its value."""
    graph = target.graph
    name, shown_name = (target.model_name, "{model}") if graph is None else (graph.name, "{workflow}")
    shown: list[str] = []
    for part in path.split("/")[:_MOST_PARTS]:
        if part == name or part.startswith(f"{name}:"):
            shown.append(shown_name + part[len(name) :])
        elif shown[-1:] == ["{model}"] and part not in _VERBS:
            shown.append("{version}")
        elif shown[-1:] == ["{version}"] and part not in _VERBS:
            return "/".join([*shown, "{rest}"])
        else:
            shown.append(part)
    return "/".join(shown)
