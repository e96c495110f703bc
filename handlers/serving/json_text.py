"""JSON as handlers read and write it: what Python's `json` gives, in a fraction of its time.

Many models are asked by a list of numbers and answer with one, and then most of a request's time in the model worker
goes into these texts. What the quick ways do not give to the letter as `json` does, `json` does itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import Any, Final

import orjson

_INDENTED: Final = json.JSONEncoder(indent=2)
#: orjson makes a float of a whole number that 64 bits do not hold; such a number has this many digits or more.
_MANY_DIGITS: Final = b"0" * 19
_ALL_DIGITS: Final = bytes.maketrans(b"123456789", b"0" * 9)
_POINT: Final = ord(".")
#: Python writes smaller numbers than these zeros begin, and those beyond 1e16, with exponents of its own form.
_SMALL: Final = "0.0000"
_FLOATS: Final = {float}
_INTS: Final = {int}
_STRINGS: Final = {str}
_CONSTANTS: Final = {None: "null", True: "true", False: "false"}


class _Other(Exception):
    """A value that is for `json` to write, or to refuse."""


def loads(text: bytes) -> Any:
    """Returns the value that a JSON text in UTF-8 stands for, as `json.loads` does.

    Raises:
        ValueError: it is no JSON, or no UTF-8.
        RecursionError: its arrays and objects are nested too deep.
    """
    if not _has_long_number(text):
        # What it refuses may be all right for `json`: NaN, halves of surrogate pairs, numbers beyond a float.
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(text)
    return json.loads(text.decode("utf-8"))


def _has_long_number(text: bytes) -> bool:
    """Whether so many digits stand together, and are not the decimals that small numbers commonly have."""
    digits = text.translate(_ALL_DIGITS)
    at = digits.find(_MANY_DIGITS)
    while at > 0 and digits[at - 1] == _POINT:
        at = digits.find(_MANY_DIGITS, at + len(_MANY_DIGITS))
    return at >= 0


def dumps(value: Any) -> str:
    """Returns the JSON text of a value, as `json.dumps(value, indent=2)` does, which is ASCII.

    Raises:
        TypeError: a type that JSON has no form for.
        ValueError: it contains itself, or a number of too many digits.
        RecursionError: it is nested too deep.
    """
    try:
        return _text(value, "\n")
    except (_Other, RecursionError):
        return _INDENTED.encode(value)


def _text(value: Any, line: str) -> str:
    """The text of a value on a line that `line`, a line feed and its indentation, begins."""
    kind = type(value)
    if kind is list or kind is tuple:
        return _list(value, line) if value else "[]"
    if kind is dict:
        return _object(value, line) if value else "{}"
    if kind is str:
        return encode_basestring_ascii(value)
    if kind is int:
        return int.__repr__(value)
    if kind is float and isfinite(value):
        return float.__repr__(value)
    if value is None or kind is bool:
        return _CONSTANTS[value]
    raise _Other


def _list(values: list[Any] | tuple[Any, ...], line: str) -> str:
    inner = line + "  "
    return f"[{inner}{(',' + inner).join(_texts(values, inner))}{line}]"


def _object(fields: dict[Any, Any], line: str) -> str:
    if set(map(type, fields)) != _STRINGS:
        raise _Other  # `json` makes texts of numbers, and refuses the rest
    inner = line + "  "
    texts = zip(map(encode_basestring_ascii, fields), _texts(tuple(fields.values()), inner), strict=True)
    return f"{{{inner}{(',' + inner).join([f'{name}: {text}' for name, text in texts])}{line}}}"


def _texts(values: Sequence[Any], line: str) -> list[str]:
    kinds = set(map(type, values))
    if kinds == _FLOATS:
        return _floats(values)
    if kinds == _INTS:
        return list(map(int.__repr__, values))
    return [_text(each, line) for each in values]


def _floats(values: Sequence[float]) -> list[str]:
    text = orjson.dumps(values).decode()
    if "n" in text:  # null stands for what JSON has no number for
        raise _Other
    if "e" in text or _SMALL in text:
        return list(map(float.__repr__, values))
    return text[1:-1].split(",")
