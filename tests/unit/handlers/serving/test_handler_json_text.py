"""The quick ways to read and write JSON give what Python's own `json` gives, whatever the text or value."""

from __future__ import annotations

import enum
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgi_ts.handlers.serving.json_text import dumps, loads

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.floats())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        *(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.text(), inner), st.dictionaries(KEYS, inner)),
        *(st.lists(st.floats()), st.lists(st.integers()), st.lists(st.text())),
    ),
    max_leaves=12,
)


def outcome(function: Callable[[Any], Any], argument: Any) -> str:
    """What a function does with an argument, such that -0.0 is told from 0 and a NaN is one."""
    try:
        return repr(function(argument))
    except (ValueError, TypeError, RecursionError) as error:
        return type(error).__name__.replace("JSONDecodeError", "ValueError").replace("UnicodeDecodeError", "ValueError")


def by_json(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"))


@given(VALUES)
def test_values_are_written_as_by_json(value: Any) -> None:
    assert dumps(value) == json.dumps(value, indent=2)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_texts_are_read_as_by_json(value: Any, indent: int | None, escaped: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert outcome(loads, text) == outcome(by_json, text)


@given(st.text(alphabet='0123456789.eE+-[]{}",: \\udntrufalsN\x00\ud800é\ufeff', max_size=30))
def test_what_is_nearly_json_is_read_as_by_json(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    assert outcome(loads, raw) == outcome(by_json, raw)


@pytest.mark.parametrize(
    "text",
    [
        *("18446744073709551616", "-9223372036854775809", "[1, 123456789012345678901234567890]", "-0", "1e400", "NaN"),
        *("[-Infinity]", '"\\ud800"', '{"a": 1, "a": 2}', "[0.1e-400, 5e-324, 1e23]", "", " ", "[1,]", "01", '"a\tb"'),
        *("1" * 5000, "[0.01234567890123456789, 12345678901234567890]", "[1.0123456789012345678901234567890123456789]"),
        *("0.12345678901234567890e5", ".12345678901234567890", "1.12345678901234567890.12345678901234567890"),
    ],
)
def test_numbers_and_texts_at_the_edge(text: str) -> None:
    assert outcome(loads, text.encode()) == outcome(by_json, text.encode())


def test_decimals_are_no_long_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0.012345678901234567, -1.2345678901234567, 5e-324, 0.00012345678901234567, 1234567.0]
    text = json.dumps(numbers).encode()
    monkeypatch.delattr(json, "loads")  # which takes ten times as long
    assert loads(text) == numbers


def test_text_that_is_no_utf_8() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        loads(b'"\xff"')


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        *([np.float64(0.1), 0.25], [np.float64(2.0)], np.float64(1e300), Level.HIGH, [Level.HIGH], [Text("b")]),
        *({Text("a"): 1}, [0.0001, 0.5], [0.00001234, 0.5], [9.99e15, 1e15], [1.5e300, 1.0], [123456789.12345678, 0.1]),
        *(OrderedDict(a=[1.5]), [float("nan"), 1.0], {"n": float("-inf")}, [1, True, 2], [], {}, (), [[], {}], "n"),
        *([1e16, 1e-5, 1.0, -0.0], {1: 2, None: 3}, ["é\u2028\ud800"], {"cat": 0.75, "dog": 0.25}),
    ],
)
def test_values_of_handlers(value: Any) -> None:
    assert dumps(value) == json.dumps(value, indent=2)


def test_values_that_json_refuses() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    for value in (circle, deep, object(), [object()], {"a": {1}}, {(1, 2): 3}, [np.float32(1.0)], b"a", 10**5000):
        expected = outcome(lambda value: json.dumps(value, indent=2), value)
        assert outcome(dumps, value) == expected
        assert expected in ("ValueError", "TypeError", "RecursionError")
