"""The charts of README.md show the newest published results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_shows_the_newest_results(theme: str) -> None:
    results = json.loads(max((REPOSITORY / "benchmarks" / "results").glob("2*.json")).read_text())
    chart = (REPOSITORY / "docs" / "images" / f"throughput-{theme}.svg").read_text()
    rates = [load["per_second"] for server in results["summary"].values() for load in server["load"].values()]
    assert len(rates) == 12
    missing = [rate for rate in rates if f"> {rate:,.0f}<" not in chart]
    assert not missing, "run: make chart"
    assert results["machine"]["when"][:10] in chart
