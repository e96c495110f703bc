"""What the benchmarks make of their figures: the best configuration for each load, and a gate that holds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from wsgi_ts.rpc import messages

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")


def figures(per_second: float, cpu_us: float, **others: float) -> dict[str, float]:
    generator = {"client_cpu_percent": 20, "client_cpu_us": 7, "refused": 0, "broken": 0, "timed_out": 0}
    return {**generator, "per_second": per_second, "cpu_us": cpu_us, **others}


def round_of(idle: float, **loads: dict[str, float]) -> dict[str, Any]:
    return {"first_answer_s": 1.0, "idle_cpu_percent": idle, "load": loads}


def test_each_line_has_the_best_configuration_and_the_cpu_time_of_the_same() -> None:
    tables, load = import_module("tables"), import_module("load")
    summary = tables.summarise(
        {
            "ours": {"as it comes": [round_of(0.4, few=figures(900, 50)), round_of(0.6, few=figures(1100, 70))]},
            "theirs": {
                "batch 1": [round_of(0.0, few=figures(2000, 30), many=figures(3000, 20, client_cpu_percent=95))],
                "batch 32": [round_of(9.0, few=figures(100, 10), many=figures(2999, 5, refused=1))],
            },
        }
    )
    loads = [load.Load("few", 1), load.Load("many", 64)]
    headings = {"ours": "ours 1", "theirs": "theirs 2"}
    assert tables.throughput_table(summary, loads, headings).splitlines()[2:] == [
        "| few | 1,000 | **2,000** (batch 1) |",
        "| many | n/a | **3,000** (batch 1) † |",
    ]
    assert tables.cpu_table(summary, loads, headings).splitlines()[2:] == [
        "| µs/request: few | 60 | **30** |",
        "| µs/request: many | n/a | **20** |",
        "| % of a core when idle | 0.5 | **0.0** |",
    ]


def test_differing_heads_are_also_shown_as_a_share_of_equal_ones() -> None:
    tables, load = import_module("tables"), import_module("load")
    summary = tables.summarise({"ours": {"one": [round_of(0, same=figures(200, 1), other=figures(150, 1, broken=1))]}})
    loads = [load.Load("same", 64, heads="equal"), load.Load("other", 64, heads="distinct")]
    assert tables.throughput_table(summary, loads, {"ours": "ours"}).splitlines()[2:] == [
        "| same | **200** |",
        "| other | **150**, with failures |",
        "| … of equal heads | 75% |",
    ]
    assert "| load generator, µs/request: other | 7 |" in tables.cpu_table(summary, loads, {"ours": "ours"})


@pytest.mark.parametrize(("now", "is_too_expensive"), [(102.9, False), (103.1, True)])
def test_the_gate_goes_by_the_median_of_the_rounds_changes(now: float, is_too_expensive: bool) -> None:
    gate = import_module("bench_gate")
    changes = (now, now, 1000, 10, now)
    rounds = [
        gate.Pair(base, base * change / 100) for base, change in zip((100, 200, 50, 70, 300), changes, strict=True)
    ]
    pairs = {(load.title, key): rounds for load in gate.LOADS for key, _ in gate.COMPARED}
    assert len(gate.too_expensive(pairs, 3.0)) == (len(gate.LOADS) if is_too_expensive else 0)
    assert f"{now - 100:+.1f} %" in gate.table(pairs)


@pytest.mark.parametrize("length", [0, 127, 128, 1000, 70_000])
def test_the_grpc_client_speaks_protobuf(length: int) -> None:
    grpc_load = import_module("grpc_load")
    body = bytes(number % 251 for number in range(length))
    request = messages.PredictionsRequest.FromString(grpc_load.predictions_request("echo", body))
    assert (request.model_name, dict(request.input)) == ("echo", {"data": body})
