"""`make bench`: wsgi-ts and TorchServe 0.12 on this machine, same archives, same load generator.

    python benchmarks/bench.py                   everything: about half an hour
    python benchmarks/bench.py --quick           one short round: about five minutes
    python benchmarks/bench.py --only wsgi-ts    one of the two
    python benchmarks/bench.py --publish         also put the table into BENCHMARKS.md

The figures go to benchmarks/results/ as JSON, with the machine and the versions. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archive_server import OURS, ArchiveServer, archive_models, our_server
from load import Load, check_wrk, describe, failures, measure_idle_cpu, measure_load, memory_mb
from reports import failures_told, markdown, medians, report, say
from rivals import torchserve
from servers import BenchmarkError, Server

THEIRS = torchserve.NAME
NAMES = (OURS, THEIRS)
MODELS = ("echo", "torchmodel")
SCALED_TO = 8
MARKS = ("<!-- results: written by bench.py --publish -->", "<!-- end of results -->")


SMALL = tuple(Load(f"100 B, {count} connection{'s' * (count > 1)}", count) for count in (1, 16, 64, 256))
LARGE = (Load("1 MB, 4 connections", 4, 1_000_000), Load("10 MB, 4 connections", 4, 10_000_000))
LOADS = (*SMALL, *LARGE)


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    names: tuple[str, ...]
    seconds: int
    rounds: int
    idle_seconds: int
    publish: bool


# -- one measurement each


def measure_scaling(server: ArchiveServer) -> dict[str, float]:
    """Seconds from 1 to 8 workers of a model that imports torch, and the memory of each further worker in MB."""
    _exercise(server, workers=1)
    before = _memory_mb(server)
    seconds = server.scale("torchmodel", SCALED_TO)
    ready = [each for each in server.describe("torchmodel")["workers"] if each["status"] == "READY"]
    if len(ready) != SCALED_TO:
        raise BenchmarkError(f"{server.name} has {len(ready)} ready workers instead of {SCALED_TO}.")
    _exercise(server, workers=SCALED_TO)
    after = _memory_mb(server)
    server.scale("torchmodel", 1)
    return {"scale_up_s": seconds, "worker_mb": (after - before) / (SCALED_TO - 1)}


def _exercise(server: Server, workers: int) -> None:
    """Enough requests at a time for each worker to have run its model: memory never touched is not counted."""

    def ask() -> None:
        for _ in range(20):
            server.predict("torchmodel", b"x")

    threads = [threading.Thread(target=ask) for _ in range(4 * workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _memory_mb(server: Server) -> float:
    """All processes but a JVM, whose heap grows and shrinks for reasons of its own."""
    return memory_mb(server, without="java")


# -- one server, one round


def measure(name: str, options: Options) -> dict[str, Any]:
    """Everything about one server, once. TorchServe does best with large bodies when it does not batch."""
    figures: dict[str, Any] = {"load": {}}
    if name == OURS:
        with our_server(models=MODELS) as server:
            _measure_processes(server, figures, options)
            _measure_load(server, LOADS, figures, options)
        return figures
    with torchserve.server(batch_size=32, models=MODELS) as server:
        _measure_processes(server, figures, options)
        _measure_load(server, SMALL, figures, options)
    with torchserve.server(batch_size=1, models=MODELS) as server:
        _measure_load(server, LARGE, figures, options)
    return figures


def _measure_processes(server: ArchiveServer, figures: dict[str, Any], options: Options) -> None:
    figures["first_answer_s"] = server.first_answer_s
    say(f"{server.name}: first answer after {server.first_answer_s:.2f} s")
    figures.update(measure_scaling(server))
    say(f"{server.name}: 1 to {SCALED_TO} workers in {figures['scale_up_s']:.2f} s, "
        f"{figures['worker_mb']:.0f} MB for each further one")  # fmt: skip
    figures["idle_cpu_percent"] = measure_idle_cpu(server, options.idle_seconds)
    say(f"{server.name}: {figures['idle_cpu_percent']:.1f} % of a core when idle")


def _measure_load(server: Server, loads: Sequence[Load], figures: dict[str, Any], options: Options) -> None:
    for load in loads:
        found = measure_load(server, load, options.seconds)
        figures["load"][load.title] = found
        say(f"{server.name}: {load.title}: {describe(found)}")


# -- all of it


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median over the rounds, per server."""
    summary: dict[str, dict[str, Any]] = {}
    for name, found in rounds.items():
        summary[name] = {
            key: statistics.median(each[key] for each in found)
            for key in ("first_answer_s", "scale_up_s", "worker_mb", "idle_cpu_percent")
        }
        summary[name]["load"] = {load.title: medians([each["load"][load.title] for each in found]) for load in LOADS}
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table, one line per load, with the ratio to TorchServe where both ran."""
    names = [name for name in NAMES if name in summary]
    both = len(names) == len(NAMES)
    lines = [["", *names, *(["ratio"] if both else [])]]

    def add(title: str, cells: list[str], ratio: float) -> None:
        lines.append([title, *cells, *([f"{ratio:.1f}"] if both else [])])

    for load in LOADS:
        found = [summary[name]["load"][load.title] for name in names]
        cells = [
            f"{each['per_second']:,.0f}/s (p50 {each['p50_ms']:.2f} ms, p99 {each['p99_ms']:.2f} ms)"
            + (", with failures" if failures(each) else "")
            for each in found
        ]
        add(load.title, cells, found[0]["per_second"] / found[-1]["per_second"])
    for title, key, form in (
        ("command to first answer", "first_answer_s", "{:.2f} s"),
        (f"1 to {SCALED_TO} workers with torch", "scale_up_s", "{:.2f} s"),
        ("memory of a further worker (PSS)", "worker_mb", "{:.0f} MB"),
        ("CPU when idle, of one core", "idle_cpu_percent", "{:.1f} %"),
    ):
        values = [float(summary[name][key]) for name in names]
        # Less is better here: the ratio says how many times less.
        add(title, [form.format(value) for value in values], values[-1] / max(values[0], 0.001))
    return markdown(*lines)


def parse_options() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures wsgi-ts and TorchServe 0.12 on this machine.")
    parser.add_argument("--only", choices=(*NAMES, "ours"), help="only one of the two")
    parser.add_argument("--quick", action="store_true", help="one round of 3 s runs: a first impression")
    parser.add_argument("--seconds", type=int, help="length of each run (default 10)")
    parser.add_argument("--rounds", type=int, help="rounds, each with freshly started servers (default 3)")
    parser.add_argument("--publish", action="store_true", help="put the table into BENCHMARKS.md")
    given = parser.parse_args()
    only = OURS if given.only == "ours" else given.only
    return Options(
        names=(only,) if only else NAMES,
        seconds=given.seconds or (3 if given.quick else 10),
        rounds=given.rounds or (1 if given.quick else 3),
        idle_seconds=5 if given.quick else 20,
        publish=given.publish,
    )


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench"):
        options = parse_options()
        check_wrk()
        if THEIRS in options.names:
            torchserve.check_java()
        archive_models(MODELS)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
        for number in range(options.rounds):
            # The servers take turns, so that a machine that becomes slower or faster does so for both.
            for name in options.names:
                print(f"==> {name}, round {number + 1} of {options.rounds}", flush=True)
                rounds[name].append(measure(name, options))
        summary = summarise(rounds)
        content = {"options": asdict(options), "summary": summary, "rounds": rounds}
        report(table(summary), content, marks=MARKS if options.publish else None)


if __name__ == "__main__":
    main()
