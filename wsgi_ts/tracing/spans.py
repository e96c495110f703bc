"""Records as OpenTelemetry's spans, and the way to a collector.

A sampled request is a span of kind SERVER, by the semantic conventions for HTTP servers, with a child for each part of
it. A batch is a span in a trace of its own, with a link to each sampled request in it; the requests' own spans of the
batch link back. Its ids follow from what tells it from others, so that both sides know them without a word.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from wsgi_ts import __version__
from wsgi_ts.tracing.context import new_id, parse
from wsgi_ts.tracing.records import BATCH, RANK, REQUEST, STAGES, batch_ids

log = logging.getLogger(__name__)

#: Where a collector takes spans, behind the URL that is given.
_TRACES_PATH: Final = "/v1/traces"
_SCOPE: Final = InstrumentationScope("wsgi_ts", __version__)
#: How often it is said that spans are lost, in seconds.
_SAID_EVERY_S: Final = 60.0
#: How long the last spans get to leave, in milliseconds.
_FLUSH_MS: Final = 2000
_IN_BATCH: Final = ("handover", *STAGES)


class Spans:
    """Turns records into spans, and has them sent from a thread of the SDK's."""

    def __init__(self, endpoint: str, instance: str) -> None:
        self._instance = instance
        known = os.environ.get("OTEL_SERVICE_NAME") or os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        named = {} if "service.name=" in known or "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "wsgi-ts"}
        self._resource = Resource.create({**named, SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance})
        self._processor = BatchSpanProcessor(_Told(OTLPSpanExporter(traces_url(endpoint)), endpoint))

    def take(self, record: Mapping[str, Any]) -> None:
        """Takes the record of a request, or of a batch."""
        if record["kind"] == REQUEST:
            self._request(record)
        elif record["kind"] == BATCH:
            self._batch(record)
        elif record["kind"] == RANK:
            self._rank(record)

    def close(self) -> None:
        """Sends what is left, for a moment."""
        self._processor.force_flush(_FLUSH_MS)
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _request(self, record: Mapping[str, Any]) -> None:
        context = _context(record["trace_id"], record["span_id"], record["trace_state"])
        parent = record["parent_id"]
        started_ns = int(record["started"] * 1e9)
        is_fault = record["status"] >= 500
        attributes = {
            **record["attributes"],
            "wsgi_ts.request.id": record["request_id"],
            "wsgi_ts.model.name": record["model"],
            "wsgi_ts.model.version": record["version"],
            "wsgi_ts.batch.size": record["batch_size"],
            "wsgi_ts.batch.close_reason": record["batch_close_reason"],
            "wsgi_ts.worker": record["worker"],
            "error.type": str(record["status"]) if is_fault else None,
        }
        if record["protocol"] == "grpc":
            name = record["path"].lstrip("/")
        else:
            name = f"{record['method']} {attributes.get('http.route', record['path'])}"
            attributes |= {
                "http.request.method": record["method"],
                "http.response.status_code": record["status"],
                "url.path": record["path"],
            }
        self._emit(
            name,
            context,
            _context(record["trace_id"], parent, record["trace_state"], is_remote=True) if parent else None,
            (started_ns, started_ns + int(record["duration_ms"] * 1e6)),
            attributes,
            kind=SpanKind.SERVER,
            error=record["error"] or "failed" if is_fault else "",
        )
        self._parts(record, context, started_ns)

    def _parts(self, record: Mapping[str, Any], request: SpanContext, started_ns: int) -> None:
        """The children of a request: nodes of a workflow have parts of their own, and so has each batch."""
        node = batch = request
        for part in record["spans"]:
            name, attributes = part["name"], part["attributes"]
            context = _context(record["trace_id"], new_id(64), record["trace_state"])
            links: list[Link] = []
            if name.startswith("node "):
                parent, node, batch = request, context, context
            elif name in _IN_BATCH:
                parent = batch
            else:
                parent = node
            if name == "batch":
                batch = context
                if "batch" in record:
                    links.append(Link(self._batch_context(record["batch"])))
            begin_ns = started_ns + int(part["start_ms"] * 1e6)
            times = begin_ns, begin_ns + int(part["duration_ms"] * 1e6)
            outcome = attributes.get("outcome")
            error = "failed" if outcome == "failed" else ""
            self._emit(name, context, parent, times, _named(attributes), links=links, error=error)

    def _batch(self, record: Mapping[str, Any]) -> None:
        context = self._batch_context(record["batch"])
        posted_ns = int(record["posted"] * 1e9)
        attributes = {
            "wsgi_ts.batch.size": record["size"],
            "wsgi_ts.batch.close_reason": record["close_reason"],
            "wsgi_ts.batch.number": record["number"],
            "wsgi_ts.batch.requests": record["requests"],
            "wsgi_ts.model.name": record["model"],
            "wsgi_ts.model.version": record["version"],
            "wsgi_ts.worker": record["worker"],
            "wsgi_ts.group.size": record["ranks"] or None,
        }
        parents = [parse(each.encode(), b"") for each in record["links"] if each]
        links = [Link(_context(each.trace_id, each.span_id, "", is_remote=True)) for each in parents if each]
        end_ns = posted_ns + int(record["duration_ms"] * 1e6)
        fault = record["fault"] or ""
        name = f"batch {record['model']}"
        self._emit(name, context, None, (posted_ns, end_ns), attributes, links=links, error=fault)
        for stage, start_ms, took_ms in record["stages"]:
            own = _context(f"{context.trace_id:032x}", new_id(64), "")
            begin_ns = posted_ns + int(start_ms * 1e6)
            self._emit(stage, own, context, (begin_ns, begin_ns + int(took_ms * 1e6)), {})

    def _rank(self, record: Mapping[str, Any]) -> None:
        """A rank's part in a batch: it may come before the batch's own record."""
        batch = self._batch_context(record["batch"])
        began_ns = int(record["began"] * 1e9)
        attributes = {
            "wsgi_ts.rank": record["rank"],
            "wsgi_ts.device": record["device"],
            "wsgi_ts.gpu": record["gpu"],
            "wsgi_ts.rank.calls": record["calls"],
        }
        self._emit(
            f"rank {record['rank']}",
            _context(f"{batch.trace_id:032x}", new_id(64), ""),
            batch,
            (began_ns, began_ns + int(record["duration_ms"] * 1e6)),
            attributes,
            error=record["fault"] or "",
        )

    def _batch_context(self, key: str) -> SpanContext:
        return _context(*batch_ids(self._instance, key), "")

    def _emit(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        times_ns: tuple[int, int],
        attributes: Mapping[str, Any],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
        error: str = "",
    ) -> None:
        self._processor.on_end(
            ReadableSpan(
                name,
                context,
                parent,
                self._resource,
                {key: value for key, value in attributes.items() if value is not None},
                links=links,
                kind=kind,
                status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
                start_time=times_ns[0],
                end_time=times_ns[1],
                instrumentation_scope=_SCOPE,
            )
        )


class _Told(SpanExporter):
    """An exporter that says once a minute that a collector takes nothing, and no more."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._lost = 0
        self._say_at = 0.0
        # The SDK would log each try.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        now = time.monotonic()
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                log.info("The collector at %s takes spans again; %d were lost", self._endpoint, self._lost)
            self._lost, self._say_at = 0, 0.0
            return result
        self._lost += len(spans)
        if now >= self._say_at:
            self._say_at = now + _SAID_EVERY_S
            log.warning("The collector at %s does not take spans; %d are lost so far", self._endpoint, self._lost)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)


def traces_url(endpoint: str) -> str:
    """Returns where spans are sent: a URL that OpenTelemetry's variable gives for traces alone counts as it is."""
    if endpoint == os.environ.get(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) or endpoint.endswith(_TRACES_PATH):
        return endpoint
    return endpoint.rstrip("/") + _TRACES_PATH


def _context(trace_id: str, span_id: str, state: str, *, is_remote: bool = False) -> SpanContext:
    flags, states = TraceFlags(TraceFlags.SAMPLED), TraceState.from_header([state] if state else [])
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, flags, states)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"wsgi_ts.{name}": value for name, value in attributes.items()}
