"""`make chart`: draws the newest published results, in light and in dark.

    python benchmarks/chart.py [RESULTS.json]    default: the newest of each benchmark in benchmarks/results

Writes docs/images/throughput-*.svg for `make bench`, rivals-*.svg for `make bench-rivals`, batching-*.svg for
`make bench-batching` and growth-*.svg for `make bench-growth`; the same results give the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from growth.points import AXES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import best

BENCHMARKS = Path(__file__).resolve().parent
IMAGES = BENCHMARKS.parent / "docs" / "images"
BAR_HEIGHT = 0.38
RIVALS_PREFIX = "rivals-"
GROWTH_PREFIX = "growth-"
BATCHING_PREFIX = "batching-"
PANEL_COLUMNS = 3


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


def newest(pattern: str) -> list[Path]:
    """The newest results whose name fits, in a list; empty where there are none."""
    return sorted(BENCHMARKS.glob(f"results/{pattern}"))[-1:]


def draw_torchserve(results: dict[str, Any], theme: Theme) -> Figure:
    """Requests per second of both servers of `make bench` for each load, on a logarithmic axis."""
    servers: dict[str, Any] = results["summary"]
    loads = list(next(iter(servers.values()))["load"])
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (server, colour) in enumerate(zip(servers, theme.bars, strict=True)):
        rates = [servers[server]["load"][load]["per_second"] for load in loads]
        rows = [number + (place - 0.5) * BAR_HEIGHT for number in range(len(loads))]
        bars = axes.barh(rows, rates, BAR_HEIGHT, color=colour, label=server)
        axes.bar_label(bars, [f" {rate:,.0f}" for rate in rates], color=theme.text, fontsize=9)
    axes.set_title(_title(results, "requests/s, echo model"), color=theme.text, fontsize=10)
    axes.set_yticks(range(len(loads)), loads)
    _style(axes, theme)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(10, 200_000)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=theme.text, loc="lower right")
    return figure


def draw_rivals(results: dict[str, Any], theme: Theme) -> Figure:
    """A panel for each load with the requests per second of each server, ours first and in colour."""
    summary = results["summary"]
    loads = [load["title"] for load in results["options"]["loads"]]
    rows = -(-len(loads) // PANEL_COLUMNS)
    figure = Figure(figsize=(11, 1.75 * rows + 0.5), layout="constrained")
    figure.suptitle(_title(results, "requests/s, each server at its best"), color=theme.text, fontsize=11)
    panels = figure.subplots(rows, PANEL_COLUMNS, squeeze=False).flat
    for load, axes in zip(loads, panels, strict=False):
        found = {name: best(configurations, load) for name, configurations in summary.items()}
        rates = {name: each.figures["per_second"] for name, each in found.items() if each}
        ours, others = theme.bars
        colours = [ours if name == next(iter(summary)) else others for name in rates]
        bars = axes.barh(list(rates), list(rates.values()), 0.72, color=colours)
        axes.bar_label(bars, [f" {rate:,.0f}" for rate in rates.values()], color=theme.text, fontsize=8)
        axes.set_title(load, color=theme.text, fontsize=9, loc="left")
        axes.set_xlim(0, max(rates.values(), default=1) * 1.25)
        axes.set_xticks([])
        axes.tick_params(labelsize=8)
        _style(axes, theme)
        axes.set_ylim(len(summary) - 0.5, -0.5)  # bars of the same height, however many servers have one
    for axes in panels:
        axes.set_axis_off()
    return figure


def draw_growth(results: dict[str, Any], theme: Theme) -> Figure:
    """For each thing that grows a panel with what is served per second, and below it one with the p99."""
    axes = {name: sizes for name, sizes in results["summary"].items() if name in AXES}
    figure = Figure(figsize=(2.9 * len(axes), 4.6), layout="constrained")
    figure.suptitle(_title(results, "what is served as the work grows"), color=theme.text, fontsize=11)
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, (name, sizes) in enumerate(axes.items()):
        for row, key in enumerate(("per_second", "p99_ms")):
            panel, values = panels[row][column], [figures[key] for figures in sizes.values()]
            panel.plot(list(sizes), values, color=theme.bars[row], marker="o", markersize=4)
            for size, value in zip(sizes, values, strict=True):
                text = f"{value:,.0f}" if key == "per_second" else f"{value:,.1f}"
                panel.annotate(text, (size, value), (0, 6), textcoords="offset points", ha="center",
                               color=theme.text, fontsize=8)  # fmt: skip
            _style(panel, theme)
            panel.set_ylim(0, max(values) * 1.25 or 1)
            panel.margins(x=0.15)
            panel.set_yticks([])
            panel.tick_params(labelsize=8)
            panel.grid(axis="x", color=theme.grid, linewidth=0.6)
            unit = "chunks/s" if name == "streams" else "requests/s"
            panel.set_ylabel(unit if row == 0 else "p99, ms", color=theme.text, fontsize=8)
        panels[0][column].set_title(f"{AXES[name].title}\n({AXES[name].load})", color=theme.text, fontsize=9)
    return figure


def draw_batching(results: dict[str, Any], theme: Theme) -> Figure:
    """Throughput and p99 of the adaptive rule in parts of the best fixed rule's, a dot for each cost curve and load."""
    parts = results["summary"]
    figure = Figure(figsize=(11, 3.4 * len(parts) + 0.4), layout="constrained")
    figure.suptitle("the adaptive rule, in parts of the best fixed rule", color=theme.text, fontsize=11)
    grid = figure.subplots(len(parts), 2, squeeze=False)
    goals = (("throughput", "throughput", 0.98), ("p99", "p99 latency", 1.15))
    for (part, measured), line in zip(parts.items(), grid, strict=True):
        rows = [row for row in measured if not row["pool"]]
        loads = list(dict.fromkeys(row["load"] for row in rows))
        curves = list(dict.fromkeys(row["curve"] for row in rows))
        for axes, (key, what, goal) in zip(line, goals, strict=True):
            for curve, marker in zip(curves, "o^s", strict=True):
                found = {row["load"]: row[key] for row in rows if row["curve"] == curve}
                places = [loads.index(load) for load in found]
                axes.plot(places, list(found.values()), marker, color=theme.bars[0], fillstyle="none", label=curve)
            axes.axhline(goal, color=theme.bars[1], linewidth=1)
            axes.set_title(f"{part}: {what}; line: what may be lost", color=theme.text, fontsize=9, loc="left")
            _style(axes, theme)
            axes.set_ylim(*((0.9, 1.1) if key == "throughput" else (0.0, 2.0)))
            axes.set_xticks(range(len(loads)), loads, rotation=60, ha="right")
            axes.tick_params(labelsize=8)
            axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    grid[0][0].legend(frameon=False, labelcolor=theme.text, fontsize=8, loc="upper right")
    return figure


def _title(results: dict[str, Any], what: str) -> str:
    machine = results["machine"]
    return f"{what}, {machine['cores']} cores with the load generator ({machine['when'][:10]})"


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.invert_yaxis()
    axes.tick_params(colors=theme.text, length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


#: How the names of results begin, how those of their pictures do, and who draws them.
_KINDS: tuple[tuple[str, str, Callable[[dict[str, Any], Theme], Figure]], ...] = (
    (RIVALS_PREFIX, "rivals", draw_rivals),
    (BATCHING_PREFIX, "batching", draw_batching),
    (GROWTH_PREFIX, "growth", draw_growth),
    ("", "throughput", draw_torchserve),
)


def write(path: Path, folder: Path = IMAGES) -> None:
    """Draws one file of results, in all themes.

    Args:
        path: the results.
        folder: where the pictures go.
    """
    kind, draw = next((kind, draw) for prefix, kind, draw in _KINDS if path.name.startswith(prefix))
    results = json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    # No dates and no random ids, so that a picture changes only with its figures; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "wsgi-ts", "svg.fonttype": "none", "font.family": "sans-serif"})
    for theme in THEMES:
        target = folder / f"{kind}-{theme.name}.svg"
        draw(results, theme).savefig(target, transparent=True, metadata={"Date": None})
        print(f"{target.name}: {path.name}")


if __name__ == "__main__":
    patterns = "2*.json", f"{RIVALS_PREFIX}*.json", f"{BATCHING_PREFIX}*.json", f"{GROWTH_PREFIX}*.json"
    for file in map(Path, sys.argv[1:]) if sys.argv[1:] else [each for pattern in patterns for each in newest(pattern)]:
        write(file)
