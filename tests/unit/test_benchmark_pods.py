"""What `make bench-ray` and `make bench-lifecycle` make of their figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_a_line_for_each_way_to_serve_with_ray() -> None:
    bench = import_module("bench_ray")
    figures = {"per_second": 1234.5, "p50_ms": 52.4, "p99_ms": 131.0, "cpu_us": 1569.0, "memory_mb": 1868.0}
    figures |= {"refused": 1.0, "broken": 0.0, "timed_out": 2.0}
    assert bench.table({"ours": figures}).splitlines()[2] == (
        "| ours | 1,234 | 52 ms | 131 ms | 1,569 µs | 1,868 MB | 3 |"
    )
    assert len({case.title for case in bench.CASES}) == len(bench.CASES) == 8


def test_a_column_for_each_delay_of_the_address() -> None:
    bench = import_module("bench_lifecycle")
    none = {"requests": 100_000.0, "lost": 0.0, "end_s": 3.0, "killed": 0.0}
    some = none | {"lost": 1234.0}
    found = {"ours": {0: none, 2: none, 10: none}, "theirs": {0: some, 2: some, 10: some | {"killed": 1.0}}}
    assert bench.table(found).splitlines() == [
        "|  | at once | address removed 2 s late | address removed 10 s late | ends by itself |",
        "|---|---|---|---|---|",
        "| ours | 0 of 100,000 | 0 of 100,000 | 0 of 100,000 | yes |",
        "| theirs | 1,234 of 100,000 | 1,234 of 100,000 | 1,234 of 100,000 | no |",
    ]
