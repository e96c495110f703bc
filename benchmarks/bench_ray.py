"""`make bench-ray`: a model in Ray Serve, with our engine and with Ray's own batching, on this machine.

    python benchmarks/bench_ray.py              everything: about eight minutes
    python benchmarks/bench_ray.py --quick      one short round: about three minutes
    python benchmarks/bench_ray.py --publish    also put the table into BENCHMARKS.md

The same handler answers both, 20 ms for each batch of up to 8 requests; 64 clients ask over HTTP. Each case has a
freshly started Ray: as it comes, and in its throughput mode with HAProxy in front. The figures go to
benchmarks/results/ as JSON, with the machine and the versions.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata

import psutil
from archive_server import archive
from load import Load, check_wrk, describe, failures, measure_load, memory_mb
from reports import failures_told, markdown, medians, report, say
from servers import BENCHMARKS, PROJECT, BenchmarkError, CommandServer

PREFIX = "ray-"
MARKS = ("<!-- ray: written by bench_ray.py --publish -->", "<!-- end of ray -->")
_MARK = "WSGI_TS_BENCHMARK"
LOAD = Load("64 clients", 64)


@dataclass(frozen=True)
class Case:
    """One way to serve the model.

    Attributes:
        title: of its line.
        kind: as `apps/ray_app.py` has it.
        replicas: of Ray's.
        workers: model workers of each replica.
        fast: in Ray's throughput mode, with HAProxy in place of its own proxy.
    """

    title: str
    kind: str
    replicas: int = 1
    workers: int = 1
    fast: bool = False


_WAYS = (
    Case("@serve.batch, 1 replica", "batch"),
    Case("@serve.batch, 4 replicas", "batch", replicas=4),
    Case("wsgi-ts, 1 replica with 1 worker", "wsgi-ts"),
    Case("wsgi-ts, 1 replica with 4 workers", "wsgi-ts", workers=4),
)
CASES = (*_WAYS, *(replace(way, title=f"{way.title}; throughput mode", fast=True) for way in _WAYS))
Figures = dict[str, float]


class RayServer(CommandServer):
    """A local Ray with one application."""

    stop_limit_s = 30.0

    def __init__(self, case: Case) -> None:
        super().__init__("ray", folder="ray", models=("echo",))
        self._case = case
        self._mark = secrets.token_hex(8)

    def command(self) -> tuple[list[str], Mapping[str, str]]:
        """The driver, which serves until it is told to stop."""
        case = self._case
        words = [sys.executable, str(BENCHMARKS / "apps" / "ray_app.py"), str(self.port), case.kind]
        # Ray's sockets have long names: not below this folder.
        variables = {"RAY_TMPDIR": "/tmp", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        if case.fast:
            variables |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
        # Without the second one a process that sets its title writes over the first.
        variables |= {_MARK: self._mark, "SPT_NOENV": "1"}
        path = f"{PROJECT}{os.pathsep}{BENCHMARKS / 'apps'}"
        return [*words, str(case.replicas), str(case.workers)], {**variables, "TMPDIR": "/tmp", "PYTHONPATH": path}

    def processes(self) -> list[psutil.Process]:
        """The driver, what descends from it, and the engines, which do not."""
        found = {*super().processes()}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found.add(process)
        return list(found)

    def path(self, model: str) -> str:
        """The application's."""
        return "/"


def measure_rounds(cases: Sequence[Case], rounds: int, seconds: float) -> dict[str, list[Figures]]:
    """The figures of each case in each round; the cases take turns."""
    found: dict[str, list[Figures]] = {case.title: [] for case in cases}
    for number in range(rounds):
        print(f"==> round {number + 1} of {rounds}", flush=True)
        for case in cases:
            with RayServer(case) as server:
                figures = measure_load(server, LOAD, seconds)
                figures["memory_mb"] = memory_mb(server)
            found[case.title].append(figures)
            say(f"{case.title}: {describe(figures)}")
    return found


def table(summary: Mapping[str, Figures]) -> str:
    """The summary as a Markdown table."""
    lines: list[Sequence[str]] = [["", "requests/s", "p50", "p99", "CPU for each", "memory", "failed"]]
    for title, figures in summary.items():
        times = [f"{figures[key]:.0f} ms" for key in ("p50_ms", "p99_ms")]
        line = [title, f"{figures['per_second']:,.0f}", *times, f"{figures['cpu_us']:,.0f} µs"]
        lines.append([*line, f"{figures['memory_mb']:,.0f} MB", f"{failures(figures):.0f}"])
    return markdown(*lines)


def main() -> None:
    """Measures, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description="Measures models in Ray Serve on this machine.")
    parser.add_argument("--quick", action="store_true", help="one round of 4 s runs: a first impression")
    parser.add_argument("--seconds", type=float, help="length of each run (default 10)")
    parser.add_argument("--rounds", type=int, help="rounds, each with a freshly started Ray (default 3)")
    parser.add_argument("--publish", action="store_true", help="put the table into BENCHMARKS.md")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only cases with this in the title; may repeat")
    given = parser.parse_args()
    cases = [case for case in CASES if not given.only or any(text in case.title for text in given.only)]
    with failures_told("bench-ray"):
        if given.publish and given.only:
            raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only away")
        check_wrk()
        archive("sleep", BENCHMARKS / "apps" / "sleep_handler.py")
        count, seconds = (1, 4) if given.quick else (3, 10)
        rounds = measure_rounds(cases, given.rounds or count, given.seconds or seconds)
        summary = {title: medians(found) for title, found in rounds.items()}
        packages = {"ray": metadata.version("ray")}
        content = {"summary": summary, "rounds": rounds}
        report(table(summary), content, PREFIX, MARKS if given.publish else None, packages)


if __name__ == "__main__":
    main()
