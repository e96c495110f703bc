"""Bodies of requests that are more than bytes: named values, and references to where values lie in the segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import ReferenceKind


def pack_fields(fields: Mapping[str, bytes]) -> list[bytes]:
    """Returns the parts of a body of named values: for each the two lengths, the name in UTF-8, the value."""
    parts: list[bytes] = []
    for name, value in fields.items():
        key = name.encode()
        parts += (layout.FIELD.pack(len(key), len(value)), key, value)
    return parts


def unpack_fields(body: memoryview) -> dict[str, Any]:
    """Returns what was packed, values as bytearrays: copies, so the memory may be used again."""
    fields: dict[str, Any] = {}
    start = 0
    while start < len(body):
        name_bytes, value_bytes = layout.FIELD.unpack_from(body, start)
        start += layout.FIELD.size
        value_start = start + name_bytes
        end = value_start + value_bytes
        fields[str(body[start:value_start], "utf-8")] = bytearray(body[value_start:end])
        start = end
    return fields


def pack_reference(key: str, kind: int, offset: int = 0, length: int = 0, inline: bytes = b"") -> bytes:
    """Returns the reference that tells where the value of a key lies.

    Its value lies at `offset` of the segment, of a request in the slot `offset`; or it is `inline`, where it stands
    there. `kind` is one of ReferenceKind.
    """
    name = key.encode()
    return layout.REFERENCE.pack(len(name), kind, offset, length or len(inline)) + name + inline


def lone_value(body: memoryview) -> tuple[str, int, int] | None:
    """Returns key, offset and length where a body is one reference to a value, as most are; None for all others."""
    if len(body) < layout.REFERENCE.size:
        return None
    name_bytes, kind, offset, length = layout.REFERENCE.unpack_from(body)
    if kind != ReferenceKind.VALUE or layout.REFERENCE.size + name_bytes != len(body):
        return None
    return str(body[layout.REFERENCE.size :], "utf-8"), offset, length


def unpack_references(body: memoryview) -> Iterator[tuple[str, int, int, int, memoryview]]:
    """Yields what was packed: key, kind, offset, length, value that stands in the body."""
    start = 0
    while start < len(body):
        name_bytes, kind, offset, length = layout.REFERENCE.unpack_from(body, start)
        name_start = start + layout.REFERENCE.size
        start = name_start + name_bytes
        key = str(body[name_start:start], "utf-8")
        inline = body[start : start + length] if kind >= ReferenceKind.INLINE else body[:0]
        start += len(inline)
        yield key, kind, offset, length, inline
