"""Dataclasses that are made quickly are Python's own to whoever uses them."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

import pytest

from wsgi_ts.quick_dataclass import dataclass


def make(decorate: Any, **options: bool) -> tuple[Any, Any]:
    """A class with fields of several kinds, and one that inherits from it."""

    @decorate(**options)
    class Point:
        """A point."""

        x: int
        y: int = 0
        tags: list[str] = field(default_factory=list, compare=False)
        secret: str = field(default="s", repr=False)

    @decorate(**options)
    class Named(Point):
        """A point with a name."""

        name: str = ""

        def __repr__(self) -> str:
            return f"<{self.name}>"

    return Point, Named


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"slots": True}, {"frozen": True, "slots": True}])
def test_instances_are_as_those_of_python(options: dict[str, bool]) -> None:
    point, named = make(dataclass, **options)
    its_point, its_named = make(dataclasses.dataclass, **options)
    for ours, pythons in ((point(1, 2), its_point(1, 2)), (named(1, name="n"), its_named(1, name="n"))):
        assert repr(ours) == repr(pythons).replace("dataclasses", "dataclass")
        assert dataclasses.asdict(ours) == dataclasses.asdict(pythons)
        assert hasattr(ours, "__dict__") == hasattr(pythons, "__dict__")
        if options.get("frozen"):
            assert hash(ours) == hash(pythons)
        else:
            assert type(ours).__hash__ is type(pythons).__hash__ is None
    assert point(1, 2, ["a"]) == point(1, 2, ["b"]) != point(1, 3)
    assert dataclasses.replace(point(1, 2), y=3) == point(1, 3)
    assert point(1) != named(1)
    assert point.__match_args__ == its_point.__match_args__
    with pytest.raises(TypeError):
        point()


def test_methods_of_its_own_stay() -> None:
    @dataclass(frozen=True)
    class Folded:
        text: str

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Folded) and self.text.lower() == other.text.lower()

        def __hash__(self) -> int:
            return hash(self.text.lower())

    assert {Folded("A")} == {Folded("a")}
