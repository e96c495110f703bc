"""`make bench-workflows`: workflows in wsgi-ts and in TorchServe 0.12, on this machine, with the same archives.

    python benchmarks/bench_workflows.py                     everything: about twelve minutes
    python benchmarks/bench_workflows.py --quick             one short round: about three minutes
    python benchmarks/bench_workflows.py --only hops         one of register, four-models, chain, branches, hops,
                                                             batches; may be repeated
    python benchmarks/bench_workflows.py --server wsgi-ts    one of the two
    python benchmarks/bench_workflows.py --publish           also put the table into BENCHMARKS.md

Each case has a freshly started server. The figures go to benchmarks/results/ as JSON, with the machine and the
versions. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from archive_server import OURS, ArchiveServer, archive_models, our_server
from flows.cases import CASES, Figures, make_archives
from load import check_wrk
from reports import failures_told, markdown, medians, report, say
from rivals import torchserve
from servers import BenchmarkError

THEIRS = torchserve.NAME
SERVERS = (OURS, THEIRS)
PREFIX = "workflows-"
MARKS = ("<!-- workflows: written by bench_workflows.py --publish -->", "<!-- end of workflows -->")
#: Both start with it: a server has started when it has answered.
_MODELS = ("echo",)


@dataclass(frozen=True)
class Options:
    """What to measure, and how much."""

    names: tuple[str, ...]
    servers: tuple[str, ...]
    seconds: float
    rounds: int
    publish: bool


def _server(name: str) -> ArchiveServer:
    return our_server(models=_MODELS) if name == OURS else torchserve.server(batch_size=1, models=_MODELS)


def measure_rounds(options: Options) -> dict[str, dict[str, list[Figures]]]:
    """The figures of each round: for each case those of its servers."""
    found: dict[str, dict[str, list[Figures]]] = {name: {} for name in options.names}
    for number in range(options.rounds):
        print(f"==> round {number + 1} of {options.rounds}", flush=True)
        for name in options.names:
            # The servers take turns, so that a machine that becomes slower or faster does so for both.
            for each in options.servers:
                with _server(each) as server:
                    figures = CASES[name].measure(server, options.seconds)
                found[name].setdefault(each, []).append(figures)
                for title, cell in CASES[name].lines.items():
                    say(f"{each}: {title}: {cell(figures)}")
    return found


def summarise(rounds: Mapping[str, Mapping[str, list[Figures]]]) -> dict[str, dict[str, Figures]]:
    """The medians over the rounds."""
    return {name: {server: medians(found) for server, found in servers.items()} for name, servers in rounds.items()}


def table(summary: Mapping[str, Mapping[str, Figures]]) -> str:
    """The summary as a Markdown table: a column for each server."""
    servers = list(next(iter(summary.values())))
    lines = [
        [title, *(cell(figures[server]) for server in servers)]
        for name, figures in summary.items()
        for title, cell in CASES[name].lines.items()
    ]
    return markdown(["", *servers], *lines)


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published.
    """
    parser = argparse.ArgumentParser(description="Measures workflows in wsgi-ts and TorchServe 0.12 on this machine.")
    parser.add_argument("--only", action="append", choices=tuple(CASES), help="only this case; may be repeated")
    parser.add_argument("--server", choices=SERVERS, help="only one of the two")
    parser.add_argument("--quick", action="store_true", help="one round of 2 s runs: a first impression")
    parser.add_argument("--seconds", type=float, help="length of each run (default 6)")
    parser.add_argument("--rounds", type=int, help="rounds, each with freshly started servers (default 3)")
    parser.add_argument("--publish", action="store_true", help="put the table into BENCHMARKS.md")
    given = parser.parse_args()
    if given.publish and (given.only or given.server):
        raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only and --server away")
    return Options(
        names=tuple(name for name in CASES if not given.only or name in given.only),
        servers=(given.server,) if given.server else SERVERS,
        seconds=given.seconds or (2 if given.quick else 6),
        rounds=given.rounds or (1 if given.quick else 3),
        publish=given.publish,
    )


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-workflows"):
        options = parse_options()
        check_wrk()
        if THEIRS in options.servers:
            torchserve.check_java()
        archive_models(_MODELS)
        make_archives()
        rounds = measure_rounds(options)
        summary = summarise(rounds)
        content = {"options": asdict(options), "summary": summary, "rounds": rounds}
        report(table(summary), content, PREFIX, MARKS if options.publish else None)


if __name__ == "__main__":
    main()
