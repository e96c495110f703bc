"""Spans as OpenTelemetry's messages, encoded in pieces.

Of one request in a hundred spans are made, so they should cost little more than a request does: a message of the
library's for each would be most of that. Most of a span is the same in many. Protocol buffers let a message be written
in pieces, whose fields count together: what is the same is encoded once, by the library, and kept; ids, times and the
few attributes that each span has for itself are packed here.

https://protobuf.dev/programming-guides/encoding/ (tags, lengths, "last one wins"), and opentelemetry-proto's
`trace.proto` for the numbers of the fields.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, SpanFlags, Status

from wsgi_ts import __version__
from wsgi_ts.tracing.context import SAMPLED

INTERNAL: Final = Span.SPAN_KIND_INTERNAL
SERVER: Final = Span.SPAN_KIND_SERVER
#: A span, or what a link is to, that was made here; and one whose parent, or that itself, was made elsewhere.
HERE: Final = SAMPLED | SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
REMOTE: Final = HERE | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK

# Tags: the number of a field in its message, and how the value is encoded (0 a number in groups of seven bits, 1 eight
# bytes, 2 a length and so many bytes, 5 four bytes).
_RESOURCE_SPANS: Final = 1 << 3 | 2  # of ExportTraceServiceRequest
_SCOPE_SPANS: Final = 2 << 3 | 2  # of ResourceSpans
_SPANS: Final = 2 << 3 | 2  # of ScopeSpans
_TRACE_ID, _SPAN_ID, _PARENT_ID, _BEGIN, _END = 1 << 3 | 2, 2 << 3 | 2, 4 << 3 | 2, 7 << 3 | 1, 8 << 3 | 1  # of Span
_TRACE_STATE, _ATTRIBUTES, _LINKS = 3 << 3 | 2, 9 << 3 | 2, 13 << 3 | 2
_LINK_FLAGS: Final = 6 << 3 | 5  # of Link, whose ids have the tags of Span's
_KEY, _VALUE, _TEXT, _NUMBER = 1 << 3 | 2, 2 << 3 | 2, 1 << 3 | 2, 3 << 3  # of KeyValue and AnyValue
_ARRAY, _VALUES = 5 << 3 | 2, 1 << 3 | 2  # of AnyValue and ArrayValue

_TRACE, _SPAN, _PARENT = bytes((_TRACE_ID, 16)), bytes((_SPAN_ID, 8)), bytes((_PARENT_ID, 8))
_TIMES: Final = struct.Struct("<BQBQ")
#: Of a span without a parent: two ids, and the times.
_ROOT_BYTES: Final = 18 + 10 + 18
_CHILD_BYTES: Final = _ROOT_BYTES + 10
_LINK: Final = struct.Struct("<BB16sBB8sBI")
_SCOPE: Final = ScopeSpans(scope=InstrumentationScope(name="wsgi_ts", version=__version__)).SerializeToString()


def span(trace_id: bytes, span_id: bytes, parent: bytes, begin_ns: int, end_ns: int, more: bytes) -> bytes:
    """Returns a span as `message` takes it.

    `parent` is the id of the span above it, empty for none; times count from 1970; `more` is all else, in pieces, which
    the functions below make.
    """
    times = _TIMES.pack(_BEGIN, begin_ns, _END, max(begin_ns, end_ns))
    if parent:
        lead = _lead(_SPANS, _CHILD_BYTES + len(more))
        return b"".join((lead, _TRACE, trace_id, _SPAN, span_id, _PARENT, parent, times, more))
    return b"".join((_lead(_SPANS, _ROOT_BYTES + len(more)), _TRACE, trace_id, _SPAN, span_id, times, more))


@lru_cache(maxsize=1024)
def shared(name: str, kind: int, attributes: tuple[tuple[str, Any], ...], flags: int = HERE) -> bytes:
    """What many spans have in common: name, kind and attributes, but for those that are None."""
    made: bytes = Span(name=name, kind=kind, flags=flags, attributes=_pairs(dict(attributes))).SerializeToString()  # type: ignore[arg-type]
    return made


@lru_cache(maxsize=256)
def plain(name: str) -> bytes:
    """What spans within the server have in common of which only the name is told."""
    return shared(name, INTERNAL, ())


def text(key: bytes, value: str) -> bytes:
    """An attribute that is a text."""
    return _attribute(key, _field(_TEXT, value.encode("utf-8", "replace")))


def number(key: bytes, value: int) -> bytes:
    """An attribute that is a number, not below 0."""
    return _attribute(key, bytes((_NUMBER,)) + _varint(value))


def texts(key: bytes, values: Sequence[str]) -> bytes:
    """An attribute that is a list of texts."""
    array = b"".join([_field(_VALUES, _field(_TEXT, value.encode("utf-8", "replace"))) for value in values])
    return _attribute(key, _field(_ARRAY, array))


def link(trace_id: bytes, span_id: bytes, flags: int) -> bytes:
    """A link to another span."""
    return _field(_LINKS, _LINK.pack(_TRACE_ID, 16, trace_id, _SPAN_ID, 8, span_id, _LINK_FLAGS, flags))


def state(value: str) -> bytes:
    """The trace's state, as `tracestate` has it; empty for none."""
    return _field(_TRACE_STATE, value.encode("ascii")) if value else b""


@lru_cache(maxsize=256)
def failure(fault: str) -> bytes:
    """Says that a span has failed, and how; empty where it has not."""
    if not fault:
        return b""
    made: bytes = Span(status=Status(code=Status.STATUS_CODE_ERROR, message=fault)).SerializeToString()
    return made


def resource(attributes: Mapping[str, Any], schema_url: str) -> bytes:
    """Returns what made the spans, as `message` takes it."""
    spans = ResourceSpans(schema_url=schema_url)
    spans.resource.attributes.extend(_pairs(attributes))
    made: bytes = spans.SerializeToString()
    return made


def message(resource: bytes, spans: Sequence[bytes]) -> bytes:
    """Returns the message that a collector takes."""
    return _field(_RESOURCE_SPANS, resource + _field(_SCOPE_SPANS, _SCOPE + b"".join(spans)))


def _pairs(attributes: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any(value)) for key, value in attributes.items() if value is not None]


def _any(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, (list, tuple)):
        return AnyValue(array_value=ArrayValue(values=[_any(each) for each in value]))
    return AnyValue(string_value=str(value))


def _attribute(key: bytes, value: bytes) -> bytes:
    key_lead, value_lead = _lead(_KEY, len(key)), _lead(_VALUE, len(value))
    length = len(key_lead) + len(key) + len(value_lead) + len(value)
    return b"".join((_lead(_ATTRIBUTES, length), key_lead, key, value_lead, value))


def _field(tag: int, value: bytes) -> bytes:
    return _lead(tag, len(value)) + value


def _lead(tag: int, length: int) -> bytes:
    """What stands before a value of so many bytes."""
    if length < _SHORT:
        return _LEADS[tag][length]
    return bytes((tag,)) + _varint(length)


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first; all but the last have the eighth bit set."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


#: Most values are shorter; what stands before those is made once, for each tag of a value with a length.
_SHORT: Final = 512
_LEADS: Final = {
    tag: [bytes((tag,)) + _varint(length) for length in range(_SHORT)]
    for tag in (_KEY, _VALUE, _TRACE_STATE, _ARRAY, _ATTRIBUTES, _LINKS)
}
