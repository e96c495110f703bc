"""What `make bench-workflows` measures, and what it makes of its figures."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from wsgi_ts.workflows.spec import parse_spec

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")

ALONE = {"p50_ms": 1.234, "asked": 7.0, "failed": 0.0}
LOADED = {"per_second": 2345.6, "p50_ms": 1.0, "p99_ms": 2.345, "refused": 0.0, "broken": 0.0, "timed_out": 0.0}


def test_each_case_has_its_lines_with_a_column_for_each_server() -> None:
    bench = import_module("bench_workflows")
    hops = ALONE | {"hop_ms": 0.344, "memory_mb": 1234.0}
    rounds = {
        "four-models": {"wsgi-ts": [ALONE] * 3, "torchserve": [ALONE | {"p50_ms": 20000.0, "failed": 2.0}]},
        "hops": {"wsgi-ts": [hops, hops | {"hop_ms": 9.0}, hops], "torchserve": [hops]},
        "batches": {"wsgi-ts": [LOADED | {"batch": 15.94}], "torchserve": [LOADED | {"batch": 1.0, "refused": 3.0}]},
    }
    lines = bench.table(bench.summarise(rounds)).splitlines()
    assert lines[0] == "|  | wsgi-ts | torchserve |"
    assert [line.split(" | ", 1)[1] for line in lines[2:]] == [
        "1.23 ms | 20,000.00 ms, 2 of 7 failed |",
        "1.23 ms | 1.23 ms |",
        "0.34 ms | 0.34 ms |",
        "1,234 MB | 1,234 MB |",
        "2,346/s (p50 1.00 ms, p99 2.35 ms) | 2,346/s (p50 1.00 ms, p99 2.35 ms), with 3 failures |",
        "15.9 | 1.0 |",
    ]


def test_the_specifications() -> None:
    cases = import_module("flows.cases")
    specs = {name: parse_spec(text) for name, text in cases._SPECS.items()}
    assert specs["chain"].order == ("n1", "n2", "n3", "n4", "n5", "n6")
    assert [len(specs[name].nodes) for name in ("hop", "hops")] == [1, 4]
    assert {node.numbers.batch_size for node in specs["chain"].nodes.values()} == {1}
    assert specs["batches"].nodes["batched"].numbers.batch_size == 16
    assert specs["branches"].nodes["join"].parents == ("left", "right")
    archives = {node.url for spec in specs.values() for node in spec.nodes.values() if node.url}
    assert archives <= {f"{model}.mar" for model in cases._MODELS}


def test_a_part_of_the_figures_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = import_module("bench_workflows")
    for part in (["--only", "hops"], ["--server", "wsgi-ts"]):
        monkeypatch.setattr(sys, "argv", ["bench_workflows.py", "--publish", *part])
        with pytest.raises(bench.BenchmarkError, match="leave --only and --server away"):
            bench.parse_options()
