"""What `make bench-growth` makes of its figures: tables, and a chart that shows the newest published ones."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks_on_the_path")

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
FIGURES = {"per_second": 1234.4, "p50_ms": 1.0, "p99_ms": 2.345, "cpu_us": 17.4, "idle_cpu_percent": 0.61}


def test_each_axis_has_a_table_with_the_medians_of_its_sizes() -> None:
    bench = import_module("bench_growth")
    slower = FIGURES | {"per_second": 1000.0, "refused": 2.0}
    rounds = {
        "models": {"1": [FIGURES, FIGURES, slower | {"refused": 0.0}], "500": [slower]},
        "steps": {"": [{"first_answer_s": 1.0}, {"first_answer_s": 3.0}, {"first_answer_s": 1.2}]},
    }
    for figures in rounds["models"]["1"]:
        figures.setdefault("refused", 0.0)
    models, steps = bench.tables(bench.summarise(rounds)).split("\n\n")
    assert models.splitlines()[2:] == [
        "| 1 | 1,234 | 2.35 ms | 17 µs | 0.6 % |",
        "| 500 | 1,000, with 2 failures | 2.35 ms | 17 µs | 0.6 % |",
    ]
    assert steps.splitlines()[2:] == ["| command to first answer of a model that needs no torch | 1.20 s |"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_shows_the_newest_published_results(theme: str) -> None:
    published = sorted(BENCHMARKS.glob("results/growth-*.json"))
    if not published:
        pytest.skip("make bench-growth has not been published")
    results = json.loads(published[-1].read_text())
    chart = (REPOSITORY / "docs" / "images" / f"growth-{theme}.svg").read_text()
    rates = [figures["per_second"] for name, sizes in results["summary"].items() if name != "steps"
             for figures in sizes.values()]  # fmt: skip
    assert rates
    missing = [rate for rate in rates if f"> {rate:,.0f}<" not in chart and f">{rate:,.0f}<" not in chart]
    assert not missing, "run: make chart"
