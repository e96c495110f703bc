"""`make chart`: draws the newest published results, for README.md in light and in dark.

    python benchmarks/chart.py [RESULTS.json]    default: the newest of benchmarks/results

Writes docs/images/throughput-light.svg and throughput-dark.svg; the same results give the same bytes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).resolve().parent
IMAGES = BENCHMARKS.parent / "docs" / "images"
BAR_HEIGHT = 0.38


@dataclass(frozen=True)
class Theme:
    """Colours of one picture; the background is the page's."""

    name: str
    text: str
    grid: str
    bars: tuple[str, str]


THEMES = (
    Theme("light", "#1f2328", "#d1d9e0", ("#0969da", "#9198a1")),
    Theme("dark", "#f0f6fc", "#3d444d", ("#4493f8", "#656c76")),
)


def newest() -> Path:
    """The newest results of the servers that `make bench` compares."""
    return max(BENCHMARKS.glob("results/2*.json"))


def draw(results: dict[str, Any], theme: Theme) -> Figure:
    """Requests per second of each server for each load, on a logarithmic axis."""
    servers: dict[str, Any] = results["summary"]
    loads = list(next(iter(servers.values()))["load"])
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (server, colour) in enumerate(zip(servers, theme.bars, strict=True)):
        rates = [servers[server]["load"][load]["per_second"] for load in loads]
        rows = [number + (place - 0.5) * BAR_HEIGHT for number in range(len(loads))]
        bars = axes.barh(rows, rates, BAR_HEIGHT, color=colour, label=server)
        axes.bar_label(bars, [f" {rate:,.0f}" for rate in rates], color=theme.text, fontsize=9)
    machine = results["machine"]
    axes.set_title(
        f"requests/s, echo model, {machine['cores']} cores with the load generator ({machine['when'][:10]})",
        color=theme.text,
        fontsize=10,
    )
    axes.set_yticks(range(len(loads)), loads)
    axes.set_facecolor("none")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(10, 200_000)
    axes.invert_yaxis()
    axes.tick_params(colors=theme.text, length=0)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=theme.text, loc="lower right")
    return figure


def main() -> None:
    """Draws both pictures."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else newest()
    results = json.loads(path.read_text())
    IMAGES.mkdir(exist_ok=True)
    # No dates and no random ids, so that a picture changes only with its figures; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "wsgi-ts", "svg.fonttype": "none", "font.family": "sans-serif"})
    for theme in THEMES:
        target = IMAGES / f"throughput-{theme.name}.svg"
        draw(results, theme).savefig(target, transparent=True, metadata={"Date": None})
        print(f"{target.relative_to(BENCHMARKS.parent)}: {path.name}")


if __name__ == "__main__":
    main()
