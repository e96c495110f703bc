"""Spans that are encoded in pieces, as the library of OpenTelemetry's messages reads them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from wsgi_ts.tracing import span_codec
from wsgi_ts.tracing.span_codec import HERE, INTERNAL, REMOTE, SERVER

TRACE, SPAN, PARENT = bytes(range(1, 17)), bytes(range(8)), bytes(range(8, 16))
RESOURCE = span_codec.resource({"service.name": "x", "list": ["a", 2]}, "https://schema")


def read(*spans: bytes) -> ExportTraceServiceRequest:
    message: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(span_codec.message(RESOURCE, spans))
    return message


def read_span(more: bytes = b"", parent: bytes = b"", begin_ns: int = 1, end_ns: int = 2) -> Span:
    message = read(span_codec.span(TRACE, SPAN, parent, begin_ns, end_ns, more))
    spans: list[Span] = list(message.resource_spans[0].scope_spans[0].spans)
    [span] = spans
    return span


def test_a_message_has_its_resource_scope_and_spans() -> None:
    message = read(*(span_codec.span(TRACE, bytes([n % 256] * 8), b"", 5, 6, b"") for n in range(300)))
    [group] = message.resource_spans
    assert group.schema_url == "https://schema"
    assert [each.key for each in group.resource.attributes] == ["service.name", "list"]
    assert [each.int_value for each in group.resource.attributes[1].value.array_value.values] == [0, 2]
    [scope] = group.scope_spans
    assert scope.scope.name == "wsgi_ts"
    assert [each.span_id[0] for each in scope.spans] == [n % 256 for n in range(300)]


def test_ids_and_times() -> None:
    now = 1_795_744_858_444_411_500
    child = read_span(parent=PARENT, begin_ns=now, end_ns=now + 7)
    assert (child.trace_id, child.span_id, child.parent_span_id) == (TRACE, SPAN, PARENT)
    assert (child.start_time_unix_nano, child.end_time_unix_nano) == (now, now + 7)
    root = read_span(begin_ns=9, end_ns=3)
    assert (root.parent_span_id, root.start_time_unix_nano, root.end_time_unix_nano) == (b"", 9, 9)


def test_pieces_count_together() -> None:
    attributes: tuple[tuple[str, Any], ...] = (("a", "x"), ("gone", None), ("b", 3), ("c", True), ("d", 0.5))
    other = bytes(reversed(TRACE)), bytes(reversed(SPAN))
    span = read_span(
        span_codec.shared("POST /x", SERVER, attributes, REMOTE)
        + span_codec.text(b"own", "ö")
        + span_codec.texts(b"list", ["p", "q"])
        + span_codec.link(*other, HERE)
        + span_codec.link(TRACE, SPAN, REMOTE)
        + span_codec.state("k=v")
        + span_codec.failure("broke")
    )
    assert (span.name, span.kind, span.flags, span.trace_state) == ("POST /x", SERVER, 0x301, "k=v")
    assert [each.key for each in span.attributes] == ["a", "b", "c", "d", "own", "list"]
    values = [each.value for each in span.attributes]
    assert (values[0].string_value, values[1].int_value, values[2].bool_value) == ("x", 3, True)
    assert (values[3].double_value, values[4].string_value) == (0.5, "ö")
    assert [each.string_value for each in values[5].array_value.values] == ["p", "q"]
    assert [(each.trace_id, each.span_id, each.flags) for each in span.links] == [
        (*other, 0x101),
        (TRACE, SPAN, 0x301),
    ]
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "broke")


def test_what_there_is_not_is_not_there() -> None:
    span = read_span(span_codec.shared("x", INTERNAL, ()) + span_codec.state("") + span_codec.failure(""))
    assert not span.HasField("status")
    assert (span.kind, span.flags, span.trace_state, len(span.attributes)) == (INTERNAL, 0x101, "", 0)


@given(st.text(max_size=40000), st.integers(0, 2**63 - 1))
def test_any_text_and_number_is_read_as_it_was(text: str, number: int) -> None:
    readable = text.encode("utf-8", "replace").decode()
    span = read_span(span_codec.text(b"t", text) + span_codec.number(b"n", number))
    assert [each.value.string_value for each in span.attributes] == [readable, ""]
    assert span.attributes[1].value.int_value == number
