"""Records as lines of JSON, one each: quickly, and for whatever JSON can hold.

A record of each request is written in JSON where the access log is, and one of some requests goes from process to
process; Python's own encoder takes as long for one as all else that is done with it.
"""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

#: Made here: a handler may put something else into the place of `json.dumps`.
_ENCODE: Final = json.JSONEncoder(separators=(",", ":")).encode


def encode(record: Any) -> bytes:
    """Returns a record, whatever JSON can hold, as a line of it; named tuples are lists there."""
    try:
        return orjson.dumps(record, _fields, orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # half of a surrogate pair, or a number beyond 64 bits
        return _ENCODE(record).encode() + b"\n"


def ascii_line(record: Any) -> str:
    """Returns a record as a line for a log, without its end: what is not ASCII is escaped, so that none can be forged.

    ASCII's control characters are escaped in all JSON.
    """
    line = encode(record)
    return line[:-1].decode() if line.isascii() else _ENCODE(record)


def decode(line: bytes) -> Any:
    """Returns the record that `encode` has made a line of.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _fields(record: Any) -> tuple[Any, ...]:
    if isinstance(record, tuple):
        return tuple(record)
    raise TypeError(f"a {type(record).__name__} is no part of a record")
