"""`make bench-large`: groups of ranks and token generation of wsgi-ts on this machine, on the CPU over gloo.

    python benchmarks/bench_large.py                    everything: about ten minutes
    python benchmarks/bench_large.py --quick            one short round: about two minutes
    python benchmarks/bench_large.py --only recovery    one of handover, payload, generation, recovery; may be repeated
    python benchmarks/bench_large.py --publish          also put the figures into BENCHMARKS.md

The figures go to benchmarks/results/ as JSON, with the machine and the versions. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from archive_server import archive_models, our_server
from large import generation, handover, payload, recovery
from large.measuring import Effort, Figures
from reports import failures_told, medians, report
from servers import BenchmarkError

MEASUREMENTS = {"handover": handover, "payload": payload, "generation": generation, "recovery": recovery}
MARKS = ("<!-- large models: written by bench_large.py --publish -->", "<!-- end of large models -->")


@dataclass(frozen=True)
class Options:
    """What to measure, and how much."""

    names: tuple[str, ...]
    rounds: int
    effort: Effort
    publish: bool


def measure_rounds(options: Options) -> dict[str, list[Figures]]:
    """The figures of each measurement, round by round, each round with a freshly started server."""
    archive_models(("echo",))
    for name in options.names:
        MEASUREMENTS[name].make_archives()
    rounds: dict[str, list[Figures]] = {name: [] for name in options.names}
    for number in range(options.rounds):
        print(f"==> round {number + 1} of {options.rounds}", flush=True)
        settings = {"enable_model_api": "true"}
        with our_server(batch_size=1, web_workers=1, settings=settings, models=("echo",)) as server:
            for name in options.names:
                rounds[name].append(MEASUREMENTS[name].measure(server, options.effort))
    return rounds


def tables(summary: dict[str, Figures]) -> str:
    """The figures in Markdown, a table for each measurement."""
    return "\n\n".join(
        f"{MEASUREMENTS[name].TITLE}:\n\n{MEASUREMENTS[name].table(figures)}" for name, figures in summary.items()
    )


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published.
    """
    parser = argparse.ArgumentParser(description="Measures groups of ranks and token generation on this machine.")
    parser.add_argument("--only", action="append", choices=tuple(MEASUREMENTS), help="only this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one short round: a first impression")
    parser.add_argument("--rounds", type=int, help="rounds, each with a freshly started server (default 3)")
    parser.add_argument("--seconds", type=float, help="length of each run of token generation (default 10)")
    parser.add_argument("--publish", action="store_true", help="put the figures into BENCHMARKS.md")
    given = parser.parse_args()
    if given.publish and given.only:
        raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only away")
    batches, payloads, seconds = (200, 20, 3.0) if given.quick else (1000, 100, 10.0)
    names = tuple(name for name in MEASUREMENTS if not given.only or name in given.only)
    rounds = given.rounds or (1 if given.quick else 3)
    return Options(names, rounds, Effort(batches, payloads, given.seconds or seconds), given.publish)


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-large"):
        options = parse_options()
        rounds = measure_rounds(options)
        summary = {name: medians(found) for name, found in rounds.items()}
        content = {"options": asdict(options), "summary": summary, "rounds": rounds}
        report(tables(summary), content, "large-", MARKS if options.publish else None)


if __name__ == "__main__":
    main()
