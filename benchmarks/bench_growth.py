"""`make bench-growth`: what wsgi-ts costs as its work grows, on this machine.

    python benchmarks/bench_growth.py                 everything: about half an hour
    python benchmarks/bench_growth.py --quick         one short round: about six minutes
    python benchmarks/bench_growth.py --only models   one of web-workers, models, model-workers, connections, streams,
                                                      steps; may be repeated
    python benchmarks/bench_growth.py --publish       also put the tables into BENCHMARKS.md

Each point has a freshly started server. The figures go to benchmarks/results/ as JSON, with the machine and the
versions; `make chart` draws the newest. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from growth.points import AXES, STEPS, Axis, Figures, make_archives, measure_steps, points
from load import check_wrk
from reports import failures_told, markdown, medians, report, say
from servers import BenchmarkError

STEPS_NAME = "steps"
NAMES = (*AXES, STEPS_NAME)
PREFIX = "growth-"
MARKS = ("<!-- growth: written by bench_growth.py --publish -->", "<!-- end of growth -->")


@dataclass(frozen=True)
class Options:
    """What to measure, and how much."""

    names: tuple[str, ...]
    seconds: float
    rounds: int
    publish: bool


def measure_rounds(options: Options) -> dict[str, Any]:
    """The figures of each round: for each axis those of its sizes, by size, and those of the steps."""
    found: dict[str, Any] = {name: {} for name in options.names}
    axes = [name for name in options.names if name != STEPS_NAME]
    for number in range(options.rounds):
        print(f"==> round {number + 1} of {options.rounds}", flush=True)
        for name, size in points(axes):
            figures = AXES[name].measure(size, options.seconds)
            found[name].setdefault(str(size), []).append(figures)
            say(f"{AXES[name].title}: {size}: {', '.join(_cells(figures))}")
        if STEPS_NAME in options.names:
            steps = measure_steps()
            found[STEPS_NAME].setdefault("", []).append(steps)
            for key, seconds in steps.items():
                say(f"{STEPS[key]}: {seconds:.2f} s")
    return found


def summarise(rounds: Mapping[str, Mapping[str, list[Figures]]]) -> dict[str, dict[str, Figures]]:
    """The medians over the rounds."""
    return {name: {size: medians(found) for size, found in sizes.items()} for name, sizes in rounds.items()}


def tables(summary: Mapping[str, Mapping[str, Figures]]) -> str:
    """A table for each axis, and one of the steps."""
    parts = [_axis_table(AXES[name], sizes) for name, sizes in summary.items() if name != STEPS_NAME]
    if STEPS_NAME in summary:
        steps = summary[STEPS_NAME][""]
        parts.append(markdown(("done once", "time"), *((STEPS[key], f"{value:.2f} s") for key, value in steps.items())))
    return "\n\n".join(parts)


def _axis_table(axis: Axis, sizes: Mapping[str, Figures]) -> str:
    has_idle = "idle_cpu_percent" in next(iter(sizes.values()))
    unit = "chunks/s" if axis.title == AXES["streams"].title else "requests/s"
    head = (f"{axis.title} ({axis.load})", unit, "p99", "CPU time each", *(["CPU when idle"] if has_idle else []))
    return markdown(head, *((f"{int(size):,}", *_cells(figures)) for size, figures in sizes.items()))


def _cells(figures: Figures) -> list[str]:
    cells = [f"{figures['per_second']:,.0f}", f"{figures['p99_ms']:.2f} ms", f"{figures['cpu_us']:.0f} µs"]
    if failed := sum(figures.get(key, 0.0) for key in ("refused", "broken", "timed_out")):
        cells[0] += f", with {failed:.0f} failures"
    if "idle_cpu_percent" in figures:
        cells.append(f"{figures['idle_cpu_percent']:.1f} %")
    return cells


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published.
    """
    parser = argparse.ArgumentParser(description="Measures what wsgi-ts costs as its work grows.")
    parser.add_argument("--only", action="append", choices=NAMES, help="only this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one round of 2 s runs: a first impression")
    parser.add_argument("--seconds", type=float, help="length of each run (default 6)")
    parser.add_argument("--rounds", type=int, help="rounds, each with freshly started servers (default 3)")
    parser.add_argument("--publish", action="store_true", help="put the tables into BENCHMARKS.md")
    given = parser.parse_args()
    if given.publish and given.only:
        raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only away")
    return Options(
        names=tuple(name for name in NAMES if not given.only or name in given.only),
        seconds=given.seconds or (2 if given.quick else 6),
        rounds=given.rounds or (1 if given.quick else 3),
        publish=given.publish,
    )


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-growth"):
        options = parse_options()
        check_wrk()
        make_archives()
        rounds = measure_rounds(options)
        summary = summarise(rounds)
        content = {"options": asdict(options), "summary": summary, "rounds": rounds}
        report(tables(summary), content, PREFIX, MARKS if options.publish else None)


if __name__ == "__main__":
    main()
