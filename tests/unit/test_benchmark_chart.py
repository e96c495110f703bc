"""The charts show the newest published results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"


def shown_rates(results: dict[str, Any]) -> list[float]:
    return [load["per_second"] for server in results["summary"].values() for load in server["load"].values()]


def best_rates(results: dict[str, Any]) -> list[float]:
    rates: dict[tuple[str, str], float] = {}
    for server, configurations in results["summary"].items():
        for figures in configurations.values():
            for title, load in figures["load"].items():
                rates[server, title] = max(rates.get((server, title), 0.0), load["per_second"])
    return list(rates.values())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_shows_the_newest_results(theme: str) -> None:
    results = json.loads(max(RESULTS.glob("2*.json")).read_text())
    chart = (IMAGES / f"throughput-{theme}.svg").read_text()
    rates = shown_rates(results)
    assert len(rates) == 12
    missing = [rate for rate in rates if f"> {rate:,.0f}<" not in chart]
    assert not missing, "run: make chart"
    assert results["machine"]["when"][:10] in chart


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_of_the_rivals_shows_the_newest_results(theme: str) -> None:
    published = sorted(RESULTS.glob("rivals-*.json"))
    if not published:
        pytest.skip("make bench-rivals has not been published")
    results = json.loads(published[-1].read_text())
    chart = (IMAGES / f"rivals-{theme}.svg").read_text()
    missing = [rate for rate in best_rates(results) if f"> {rate:,.0f}<" not in chart]
    assert not missing, "run: make chart"
    assert results["machine"]["when"][:10] in chart
