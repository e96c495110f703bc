"""Records as lines of JSON."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from wsgi_ts.json_lines import ascii_line, decode, encode


class Pair(NamedTuple):
    first: Any
    second: Any = None


@pytest.mark.parametrize(
    ("record", "arrives"),
    [
        ({"text": "ö\n\u2028", "number": 1.5, "none": None}, {"text": "ö\n\u2028", "number": 1.5, "none": None}),
        (("request", Pair(Pair(1), [Pair("x")])), ["request", [[1, None], [["x", None]]]]),
        ({"half of a pair": "\ud800"}, {"half of a pair": "\ud800"}),
        ({"long": 1 << 70}, {"long": 1 << 70}),
        ({1: "a number for a name"}, {"1": "a number for a name"}),
    ],
)
def test_a_record_is_one_line(record: Any, arrives: Any) -> None:
    line = encode(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == arrives


@pytest.mark.parametrize("text", ["plain", "\x1b[2J", "\n", "\x9b2J", "\x85", "\u2028", "\u202e", "\ud800", "ö"])
def test_a_line_for_a_log_is_printable_ascii(text: str) -> None:
    line = ascii_line({"text": text, "number": 1.5})
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {"text": text, "number": 1.5}


def test_what_is_no_record_is_refused() -> None:
    for line in (b"", b"{", b"\xff"):
        with pytest.raises(ValueError):
            decode(line)
    with pytest.raises(TypeError):
        encode({"set": {1}})
