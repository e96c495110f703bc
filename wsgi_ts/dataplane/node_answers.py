"""What nodes of a workflow have answered, where that has to be read: lists to scatter, objects to put together."""

from __future__ import annotations

import json
import struct

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.errors import InternalServerError

_COUNT = struct.Struct("<I")
_MOST_SHOWN = 1000


def packed_parts(buffer: memoryview, offset: int, length: int) -> list[tuple[int, int] | bytes]:
    """Where the elements lie of a list that a function has answered, each as offset and length.

    The answer begins at `offset` of the segment with the number of elements and the bytes of each; then come they
    themselves.

    Raises:
        ValueError: it is no such list.
    """
    if length < _COUNT.size:
        raise ValueError("it is no list")
    (count,) = _COUNT.unpack_from(buffer, offset)
    start = offset + _COUNT.size * (count + 1)
    if start > offset + length:
        raise ValueError("it is no list")
    parts: list[tuple[int, int] | bytes] = []
    for size in struct.unpack_from(f"<{count}I", buffer, offset + _COUNT.size):
        parts.append((start, size))
        start += size
    return parts


def json_parts(body: bytes) -> list[tuple[int, int] | bytes]:
    """The elements of a JSON list: texts as they are, all else as its own JSON.

    Raises:
        ValueError: it is no JSON list.
    """
    try:
        values = json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(values, list):
        raise ValueError("it is no JSON list")
    return [(each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)).encode() for each in values]


def joined(bodies: dict[str, bytes]) -> Answer:
    """The answer that several nodes make together: one JSON object, with the object of each under its name."""
    found = {}
    for name, body in bodies.items():
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return Answer(InternalServerError(_last_part(body)))
        found[name] = value
    answer = Answer()
    answer.body = (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    return answer


def _last_part(body: bytes) -> str:
    """What TorchServe says of an answer that is no JSON object: the text behind its last colon."""
    try:
        text = json.dumps(json.loads(body), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        text = json.dumps(body.decode("utf-8", "replace"), ensure_ascii=False)
    return text.rpartition(":")[2].strip()[:_MOST_SHOWN]
