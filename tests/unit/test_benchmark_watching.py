"""What `make bench-watching` makes of its figures."""

from __future__ import annotations

from importlib import import_module

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")


def test_each_way_is_compared_with_the_first_of_the_same_round() -> None:
    bench = import_module("bench_watching")
    first, other, *_ = bench.WAYS
    # The machine was twice as slow in the second round, for both.
    table = bench.tables({first: [20.0, 40.0, 20.0], other: [21.0, 42.0, 20.0]}, {})
    assert table.splitlines()[2:] == [f"| {first} | 20.0 µs |  |", f"| {other} | 21.0 µs | +5.0 % (+2.5 to +5.0) |"]


def test_a_viewer_costs_what_is_more_than_without() -> None:
    bench = import_module("bench_watching")
    row = {"unseen_percent": 3.0, "seen_percent": 3.25, "scrape_p50_ms": 1.04, "scrape_p99_ms": 5.0}
    table = bench.tables({}, {"100 x 8": row})
    assert table.splitlines()[2:] == ["| 100 x 8 | 3.00 % | +0.25 % | 1.0 ms | 5.0 ms |"]
