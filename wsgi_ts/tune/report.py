"""What a tuning has found, for people and as the file that the console shows."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wsgi_ts.run_files import RunFiles
from wsgi_ts.tune.objective import Objective
from wsgi_ts.tune.prediction import Curve
from wsgi_ts.tune.search import Point, pareto
from wsgi_ts.tune.served_model import Setting
from wsgi_ts.whole_files import replace_file

_PLOT_COLUMNS, _PLOT_LINES = 60, 14
_PNG_DPI = 120


@dataclass
class Result:
    """What a tuning has found.

    Attributes:
        present: what held before; `present_point` is the same as points have it, with a number of threads.
        curve: what batches cost with the chosen setting's workers, or the present ones.
        before: the best point of what held before; None where it was not measured, or keeps the limits at no rate.
        chosen: the best point of all; None where no setting keeps the limits.
        points: all that was measured.
        warnings: what makes the figures doubtful.
    """

    model: str
    version: str
    objective: Objective
    present: Setting
    present_point: Setting
    curve: Curve
    before: Point | None = None
    chosen: Point | None = None
    points: list[Point] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """By which part of what was verified the prediction is off; None where nothing was verified."""
        if self.chosen is None:
            return None
        return abs(self.chosen.predicted - self.chosen.goodput) / self.chosen.goodput

    def to_json(self) -> dict[str, Any]:
        """The fields of the file."""
        best = pareto(self.points)
        fixed_s, per_request_s = self.curve.line
        return {
            "model": self.model,
            "version": self.version,
            "slo": self.objective.text,
            "curve": {"a_ms": round(fixed_s * 1e3, 4), "b_ms": round(per_request_s * 1e3, 4)},
            "sizes": [{"n": size, "ms": round(seconds * 1e3, 4)} for size, seconds in self.curve.sizes],
            "points": [
                {
                    "batch_size": point.setting.batch_size,
                    "workers": point.setting.workers,
                    "threads": point.setting.threads,
                    "delay_ms": 0 if point.setting.policy == "none" else point.setting.delay_ms,
                    "policy": point.setting.policy,
                    "rate": round(point.rate, 2),
                    "throughput": round(point.throughput, 2),
                    # JSON has no infinity: nothing was answered in time that could be counted.
                    "p99_ms": round(point.p99_s * 1e3, 3) if math.isfinite(point.p99_s) else None,
                    "goodput": round(point.goodput, 2),
                    "predicted": round(point.predicted, 2),
                    "pareto": place in best,
                    "chosen": point is self.chosen,
                }
                for place, point in enumerate(self.points)
            ],
            "warnings": self.warnings,
            "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def save(result: Result, run_dir: Path) -> Path:
    """Leaves the result in the run directory, in place of the model's last one; returns the file."""
    folder = RunFiles(run_dir).tune
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{result.model}.json"
    replace_file(path, json.dumps(result.to_json(), indent=1) + "\n")
    return path


def lines(result: Result) -> list[str]:
    """The result for people, without the plot."""
    fixed_s, per_request_s = result.curve.line
    busy = f"{result.curve.workers} worker{'s' if result.curve.workers > 1 else ''} busy"
    told = [f"A batch of n takes {fixed_s * 1e3:.2f} + {per_request_s * 1e3:.3f} n ms ({busy})."]
    off = max(abs(fixed_s + per_request_s * n - seconds) / seconds for n, seconds in result.curve.sizes)
    if off > 0.15:
        told.append(f"(The line is off by up to {off:.0%}; predictions use what was measured at each size.)")
    if result.before is not None:
        told.append(f"Now:    {result.present}: {result.before.goodput:.0f} requests a second within the limits.")
    elif any(point.setting == result.present_point for point in result.points):
        told.append(f"Now:    {result.present}: keeps the limits at no rate that was tried.")
    else:
        told.append(f"Now:    {result.present}: not measured, it would keep the limits at next to no rate.")
    chosen = result.chosen
    if chosen is not None:
        told.append(f"Chosen: {chosen.setting}: {chosen.goodput:.0f} requests a second within the limits")
        told.append(
            f"        (predicted {chosen.predicted:.0f}, off by {result.error:.0%}; {_values(result, chosen)})."
        )
    return told


def _values(result: Result, point: Point) -> str:
    return ", ".join(
        f"{term.text.split('=')[0].rstrip('<')} {term.value_s(point.latencies_s) * 1e3:.1f} ms"
        for term in result.objective.terms
    )


def _kinds(result: Result) -> list[str]:
    """What is said of each point: `chosen`, `pareto`, or nothing."""
    best = pareto(result.points)
    return [
        "chosen" if point is result.chosen else "pareto" if place in best else ""
        for place, point in enumerate(result.points)
    ]


def table(result: Result) -> list[str]:
    """All points, as aligned columns."""
    heads = ("workers", "threads", "batch", "rule", "asked/s", "answered/s", "p99 ms", "goodput/s", "predicted", "")
    rows = [
        (
            str(point.setting.workers),
            str(point.setting.threads or "-"),
            str(point.setting.batch_size),
            point.setting.rule,
            f"{point.rate:.0f}",
            f"{point.throughput:.0f}",
            f"{point.p99_s * 1e3:.1f}",
            f"{point.goodput:.0f}",
            f"{point.predicted:.0f}",
            kind,
        )
        for point, kind in zip(result.points, _kinds(result), strict=True)
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]


def plot(result: Result) -> list[str]:
    """The points in letters: answers a second to the right, the p99 upwards; `*` pareto, `@` chosen, `.` others."""
    shown = [each for each in zip(result.points, _kinds(result), strict=True) if math.isfinite(each[0].p99_s)]
    if not shown:
        return []
    most = max(point.throughput for point, _ in shown) * 1.05
    # What was far too much would press all the others into one line.
    top = min(max(point.p99_s for point, _ in shown) * 1.1, 3 * result.objective.longest_s)
    field_ = [[" "] * (_PLOT_COLUMNS + 1) for _ in range(_PLOT_LINES + 1)]
    for term in result.objective.terms:
        if term.percent == 99 and term.limit_s <= top:
            field_[_PLOT_LINES - round(term.limit_s / top * _PLOT_LINES)] = ["-"] * (_PLOT_COLUMNS + 1)
    letters = {"": ".", "pareto": "*", "chosen": "@"}  # of points in one place the last one is seen
    for point, kind in sorted(shown, key=lambda each: list(letters).index(each[1])):
        column = round(point.throughput / most * _PLOT_COLUMNS)
        line = _PLOT_LINES - round(min(point.p99_s, top) / top * _PLOT_LINES)
        field_[line][column] = letters[kind]
    labels = {0: f"{top * 1e3:.0f} ms", _PLOT_LINES: "0"}
    drawn = [f"{labels.get(line, ''):>9} |{''.join(row)}".rstrip() for line, row in enumerate(field_)]
    drawn.append(f"{'p99':>9} +{'-' * (_PLOT_COLUMNS + 1)}")
    drawn.append(f"{'':>11}0{f'{most:.0f} answers/s':>{_PLOT_COLUMNS}}")
    return drawn


def write_png(result: Result, path: Path) -> str:
    """Draws the plot into a file; returns a line that says so, or how it can be."""
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install 'wsgi-ts[bench]')."
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    shown = [each for each in zip(result.points, _kinds(result), strict=True) if math.isfinite(each[0].p99_s)]
    for kind, style, size in (("", "o", 6), ("pareto", "s", 6), ("chosen", "*", 14)):
        points = [point for point, its_kind in shown if its_kind == kind]
        answers, p99s_ms = [each.throughput for each in points], [each.p99_s * 1e3 for each in points]
        axes.plot(answers, p99s_ms, style, label=kind or "measured", markersize=size)
    for term in result.objective.terms:
        axes.axhline(term.limit_s * 1e3, linestyle="--", linewidth=1, color="grey")
        axes.annotate(term.text, (0, term.limit_s * 1e3), fontsize=8, va="bottom")
    axes.set(xlabel="answers a second", ylabel="p99 of the latency, ms", title=f"{result.model} {result.version}")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 3e3 * result.objective.longest_s)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=_PNG_DPI)
    pyplot.close(figure)
    return f"Picture: {path}"


def new_keys(before: Setting, chosen: Setting) -> dict[str, Any]:
    """What a model-config.yaml would have to say of a setting besides what holds already."""
    keys: dict[str, Any] = {}
    if chosen.workers != before.workers:
        keys |= {"minWorkers": chosen.workers, "maxWorkers": chosen.workers}
    if chosen.batch_size != before.batch_size:
        keys["batchSize"] = chosen.batch_size
    if chosen.policy != before.policy:
        keys["batchPolicy"] = chosen.policy
    if chosen.policy != "none" and chosen.delay_ms != before.delay_ms:
        keys["maxBatchDelay"] = chosen.delay_ms
    if chosen.threads != before.threads:
        keys["threadsPerWorker"] = chosen.threads
    return keys


def config_diff(name: str, text: str, keys: Mapping[str, Any]) -> list[str]:
    """What would change in a model-config.yaml ("" for none) that is to say `keys`, as `diff -u` prints it."""
    changed = text
    for key, value in keys.items():
        line = re.compile(rf"^{key}[ \t]*:[ \t]*[^#\n]*?(?=[ \t]*(?:#|$))", re.MULTILINE)
        if line.search(changed):
            changed = line.sub(f"{key}: {value}", changed, count=1)
        else:
            changed += f"{'' if not changed or changed.endswith(chr(10)) else chr(10)}{key}: {value}\n"
    before = f"a/{name}" if text else "/dev/null"
    found = difflib.unified_diff(text.splitlines(), changed.splitlines(), before, f"b/{name}", lineterm="")
    return list(found)


def nearest(result: Result, curves: Sequence[Curve]) -> str:
    """What a model comes to that keeps the limits at no rate, and why."""
    objective = result.objective
    curve = min(curves, key=lambda each: each.model(1).cost_s(1))
    alone = curve.alone_s()
    broken = objective.broken(alone)
    if broken:
        told = ", ".join(f"{term.text} would be {term.value_s(alone) * 1e3:.1f} ms" for term in broken)
        return (
            f"{objective.text} cannot be met: even where nobody else asks, {told}. The handler takes "
            f"{curve.model(1).cost_s(1) * 1e3:.1f} ms for one request, the way there and back "
            f"{curve.overhead_s * 1e3:.1f} ms. The nearest is batches of 1; beyond that the handler has to be faster."
        )
    told = f"{objective.text} is kept while nobody else asks, but at none of the rates that were tried."
    if result.points:
        point = max(result.points, key=lambda each: objective.share(each.latencies_s))
        told += f" The nearest: {point.setting}, {point.rate:.0f} requests a second, {_values(result, point)}."
    return told + " More time (--minutes) tries lower ones."
