"""What is told of a request that a web worker has answered, for its trace."""

from __future__ import annotations

from wsgi_ts.batcher.shm.request_codec import read_times
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.dataplane.http_facts import MOST_TEXT, client_of
from wsgi_ts.dataplane.request_traces import RequestTraces, error_text
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.stories import Told, run_fields
from wsgi_ts.logs.request_line import request_line
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.connection import Connection


def told_of(traces: RequestTraces, connection: Connection, target: Target, status: int, took_ns: int) -> Told:
    """Returns what is known of the request under way, which is being answered."""
    head = connection.head
    graph = target.graph
    return Told(
        request_id=connection.request_id,
        model=target.model_name if graph is None else graph.name,
        version=traces.version_of(target),
        protocol="http" if graph is None else "workflow",
        method=head.method if head is not None else "",
        path=head.path[:MOST_TEXT] if head is not None else "",
        status=status,
        error=error_text(connection.fault),
        arrived_ns=connection.arrival_ns,
        submitted_ns=connection.submitted_ns,
        answered_ns=connection.arrival_ns + took_ns,
        times=traces.times_of(connection.answered_slot) if graph is None else None,
        nodes=traces.node_runs(connection.walk) if connection.walk is not None else (),
        trace=connection.trace,
        parent=connection.parent,
        left_in=connection.left_in,
        peer=connection.peer,
        head=head.raw.decode("latin-1") if head is not None and connection.trace is not None else "",
        is_tls=isinstance(connection.sock, TlsSocket),
    )


def json_line(segment: Segment | None, connection: Connection, status: int, took_ns: int) -> str:
    """Returns the line of the access log for the request under way, which is being answered."""
    head, target, trace = connection.head, connection.target, connection.trace
    graph = target.graph if target is not None else None
    slot = connection.answered_slot
    times = read_times(segment, slot) if segment is not None and slot >= 0 and graph is None else None
    address, port = client_of(connection.peer)
    fields = {
        "request_id": connection.request_id,
        "trace_id": trace.trace_id if trace is not None else None,
        "span_id": trace.span_id if trace is not None else None,
        "http.request.method": head.method if head is not None else None,
        "url.path": head.path[:MOST_TEXT] if head is not None else None,
        "http.response.status_code": status,
        "client.address": address,
        "client.port": port,
        "model": (target.model_name if graph is None else graph.name) if target is not None else None,
        "version": target.version if target is not None else None,
        "error.message": error_text(connection.fault),
    }
    return request_line(took_ns, {**fields, **run_fields(times, connection.submitted_ns)})
