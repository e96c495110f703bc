"""A request of named byte strings (gRPC's `input`) as it lies in a slot: no text to escape, one copy on either side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsgi_ts.batcher.shm.layout import FIELD


def pack_fields(fields: Mapping[str, bytes]) -> list[bytes]:
    """The parts of the body, in order: for each field the two lengths, the name in UTF-8, the value."""
    parts: list[bytes] = []
    for name, value in fields.items():
        key = name.encode()
        parts += (FIELD.pack(len(key), len(value)), key, value)
    return parts


def unpack_fields(body: memoryview) -> dict[str, Any]:
    """What was packed, values as bytearrays: copies, so the memory may be used again."""
    fields: dict[str, Any] = {}
    start = 0
    while start < len(body):
        name_bytes, value_bytes = FIELD.unpack_from(body, start)
        start += FIELD.size
        value_start = start + name_bytes
        end = value_start + value_bytes
        fields[str(body[start:value_start], "utf-8")] = bytearray(body[value_start:end])
        start = end
    return fields
