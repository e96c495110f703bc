"""`make bench-rivals`: wsgi-ts and the servers that it is compared with, on this machine and with the same load.

    python benchmarks/bench_rivals.py                   everything: about an hour and a quarter
    python benchmarks/bench_rivals.py --quick           one short round: about a quarter of an hour
    python benchmarks/bench_rivals.py --only mosec      only this server; may be repeated
    python benchmarks/bench_rivals.py --load heads      only the loads whose title has this in it; may be repeated
    python benchmarks/bench_rivals.py --publish         also put the tables into BENCHMARKS.md

The figures go to benchmarks/results/ as JSON, with the machine and the versions. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archive_server import OURS, archive_models, our_server
from load import Load, check_wrk, describe, measure_idle_cpu, measure_load
from reports import failures_told, report, say
from rivals import granian, litserve, mosec, torchserve, triton
from servers import BENCHMARKS, BenchmarkError, Rival, Server
from tables import CEILING, cpu_table, summarise, throughput_table

MODELS = ("echo", "mlp", "json")
#: In the order of the tables; the last one is no model server but the ceiling of HTTP alone.
SERVERS = {
    server.name: server
    for server in (
        Rival(OURS, {"as it comes": lambda: our_server(models=MODELS)}),
        torchserve.RIVAL,
        triton.RIVAL,
        mosec.RIVAL,
        litserve.RIVAL,
        granian.RIVAL,
    )
}
#: The package of each requirements file whose version stands in the tables.
PACKAGES = {"triton": "nvidia-pytriton"}
LOADS = (
    *(Load(f"100 B, {count} connection{'s' * (count > 1)}", count) for count in (1, 16, 64, 256)),
    Load("100 KB, 4 connections", 4, 100_000),
    Load("1 MB, 4 connections", 4, 1_000_000),
    Load("10 MB, 4 connections", 4, 10_000_000),
    Load("equal heads of 12 lines, 64 connections", 64, heads="equal"),
    Load("differing heads of 12 lines, 64 connections", 64, heads="distinct"),
    Load("small model, raw float32, 16 connections", 16, model="mlp"),
    Load("small model, raw float32, 64 connections", 64, model="mlp"),
    Load("small model, JSON, 16 connections", 16, model="json"),
    Load("gRPC, 1 KB, 16 calls", 16, 1000, grpc=True),
)
CPU_LOADS = (*LOADS[:3], *(load for load in LOADS if load.heads))
MARKS = ("<!-- rivals: written by bench_rivals.py --publish -->", "<!-- end of rivals -->")

#: For each server, for each configuration, what each round found.
Rounds = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class Options:
    """What to measure, and how much."""

    names: tuple[str, ...]
    loads: tuple[Load, ...]
    seconds: float
    idle_seconds: float
    rounds: int
    publish: bool


def measure_rounds(options: Options) -> tuple[Rounds, list[str]]:
    """What each round found, and what went wrong.

    Servers take turns, so that a machine that gets slower does so for all of them.
    """
    rounds: Rounds = {name: {each: [] for each in SERVERS[name].configurations} for name in options.names}
    troubles = []
    for number in range(options.rounds):
        for name in options.names:
            for configuration, make in SERVERS[name].configurations.items():
                print(f"==> {name}, {configuration}, round {number + 1} of {options.rounds}", flush=True)
                try:
                    with make() as server:
                        rounds[name][configuration].append(measure(server, options))
                except (BenchmarkError, OSError) as error:
                    # An hour's figures of the others are worth keeping; the status says that something is missing.
                    troubles.append(f"{name}, {configuration}: {error}")
                    say(troubles[-1])
    return rounds, troubles


def measure(server: Server, options: Options) -> dict[str, Any]:
    """Everything about one freshly started server in one configuration."""
    figures: dict[str, Any] = {"first_answer_s": server.first_answer_s, "load": {}}
    figures["idle_cpu_percent"] = measure_idle_cpu(server, options.idle_seconds)
    say(f"first answer after {server.first_answer_s:.2f} s, {figures['idle_cpu_percent']:.1f} % of a core when idle")
    for load in options.loads:
        if load.model in server.models and (server.grpc or not load.grpc):
            figures["load"][load.title] = measure_load(server, load, options.seconds)
            say(f"{load.title}: {describe(figures['load'][load.title])}")
    return figures


def versions(names: Sequence[str]) -> dict[str, str]:
    """The version of each server but ours, from its requirements file."""
    found = {}
    for name in names:
        if name != OURS:
            package = PACKAGES.get(name, name)
            pinned = re.search(
                rf"^{package}==(\S+)$", (BENCHMARKS / "rivals" / f"{name}.txt").read_text(), re.MULTILINE
            )
            found[name] = f"{package} {pinned[1]}" if pinned else package
    return found


def heading(name: str, version: str) -> str:
    """How a server is called in the tables."""
    if name == CEILING:
        return f"HTTP alone: {version}"
    return f"{name}, {version}" if name in PACKAGES else version


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published, or no load is left.
    """
    parser = argparse.ArgumentParser(description="Measures wsgi-ts and other model servers on this machine.")
    parser.add_argument("--only", action="append", choices=tuple(SERVERS), help="only this server; may be repeated")
    parser.add_argument(
        "--load", action="append", metavar="TEXT", help="only loads with this in the title; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="one round of 2 s runs: a first impression")
    parser.add_argument("--seconds", type=float, help="length of each run (default 6)")
    parser.add_argument("--rounds", type=int, help="rounds, each with freshly started servers (default 3)")
    parser.add_argument("--publish", action="store_true", help="put the tables into BENCHMARKS.md")
    given = parser.parse_args()
    if given.publish and (given.only or given.load):
        raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only and --load away")
    loads = tuple(load for load in LOADS if not given.load or any(text in load.title for text in given.load))
    if not loads:
        raise BenchmarkError("no load has that in its title; there are: " + "; ".join(load.title for load in LOADS))
    return Options(
        names=tuple(name for name in SERVERS if not given.only or name in given.only),
        loads=loads,
        seconds=given.seconds or (2 if given.quick else 6),
        idle_seconds=3 if given.quick else 15,
        rounds=given.rounds or (1 if given.quick else 3),
        publish=given.publish,
    )


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-rivals"):
        options = parse_options()
        check_wrk()
        if torchserve.NAME in options.names:
            torchserve.check_java()
        archive_models(MODELS)
        rounds, troubles = measure_rounds(options)
        summary, found = summarise(rounds), versions(options.names)
        headings = {OURS: OURS, **{name: heading(name, text) for name, text in found.items()}}
        cpu_loads = [load for load in CPU_LOADS if load in options.loads]
        text = f"{throughput_table(summary, options.loads, headings)}\n\n{cpu_table(summary, cpu_loads, headings)}"
        content = {"options": asdict(options), "summary": summary, "rounds": rounds, "troubles": troubles}
        packages = {package: version for package, _, version in (each.partition(" ") for each in found.values())}
        report(text, content, "rivals-", MARKS if options.publish and not troubles else None, packages)
        if troubles:
            raise BenchmarkError("some figures are missing:\n" + "\n".join(troubles))


if __name__ == "__main__":
    main()
