"""`make bench`: wsgi-ts and TorchServe 0.12 on this machine, same archives, same load generator.

    python benchmarks/bench.py                   everything: about half an hour
    python benchmarks/bench.py --quick           one short round: about five minutes
    python benchmarks/bench.py --only wsgi-ts    one of the two
    python benchmarks/bench.py --publish         also put the table into BENCHMARKS.md

The figures go to benchmarks/results/ as JSON, with the machine and the versions. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from servers import (
    BENCHMARKS,
    PROJECT,
    BenchmarkError,
    Server,
    archive_models,
    check_tools,
    install_torchserve,
)

OURS, THEIRS = "wsgi-ts", "torchserve"
NAMES = (OURS, THEIRS)
SCALED_TO = 8
TABLE_BEGIN, TABLE_END = "<!-- results: written by bench.py --publish -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Scenario:
    """One load: a body size and a number of connections that each wait for their answer.

    `large` ones run against TorchServe without batching, which is what it does best with large bodies.
    """

    title: str
    body_bytes: int
    connections: int
    large: bool = False


SCENARIOS = (
    Scenario("100 B, 1 connection", 100, 1),
    Scenario("100 B, 16 connections", 100, 16),
    Scenario("100 B, 64 connections", 100, 64),
    Scenario("100 B, 256 connections", 100, 256),
    Scenario("1 MB, 4 connections", 1_000_000, 4, large=True),
    Scenario("10 MB, 4 connections", 10_000_000, 4, large=True),
)


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    names: tuple[str, ...]
    seconds: int
    rounds: int
    idle_seconds: int
    publish: bool


# -- one measurement each


def run_load(server: Server, scenario: Scenario, seconds: int) -> dict[str, float]:
    """The figures of one run of wrk.

    Raises:
        BenchmarkError: the server does not echo, or wrk gave no figures.
    """
    body = os.urandom(scenario.body_bytes)
    if server.predict("echo", body) != body:
        raise BenchmarkError(f"{server.name} answers {scenario.title} with something else than what was sent.")
    done = subprocess.run(
        ["wrk", "-t1", f"-c{scenario.connections}", f"-d{seconds}s", "--timeout", "60s",
         "-s", str(BENCHMARKS / "load.lua"), f"{server.inference}/predictions/echo"],
        env={**os.environ, "BODY_BYTES": str(scenario.body_bytes)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            figures: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            answered = figures["requests"] - figures["refused"]
            figures["per_second"] = answered / figures["seconds"]
            return figures
    raise BenchmarkError(f"wrk gave no figures for {scenario.title}:\n{done.stdout}{done.stderr}")


def measure_idle_cpu(server: Server, seconds: int) -> float:
    """Per cent of one core that all the server's processes use while nobody asks."""
    before = _cpu_seconds(server)
    time.sleep(seconds)
    return max(0.0, _cpu_seconds(server) - before) / seconds * 100


def _cpu_seconds(server: Server) -> float:
    total = 0.0
    for process in server.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure_scaling(server: Server) -> dict[str, float]:
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
    """PSS of all processes but a JVM, whose heap grows and shrinks for reasons of its own."""
    total_kb = 0
    for process in server.processes():
        try:
            if process.name() == "java":
                continue
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            continue
        total_kb += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total_kb / 1000


# -- one server, one round


def measure(name: str, options: Options) -> dict[str, Any]:
    """Everything about one server, once."""
    figures: dict[str, Any] = {"load": {}}
    small = [scenario for scenario in SCENARIOS if not scenario.large]
    large = [scenario for scenario in SCENARIOS if scenario.large]
    if name == OURS:
        with make_server(name, batch_size=32) as server:
            _measure_processes(server, figures, options)
            _measure_load(server, [*small, *large], figures, options)
        return figures
    with make_server(name, batch_size=32) as server:
        _measure_processes(server, figures, options)
        _measure_load(server, small, figures, options)
    with make_server(name, batch_size=1) as server:
        _measure_load(server, large, figures, options)
    return figures


def make_server(name: str, batch_size: int) -> Server:
    """The server, not yet started."""
    if name == OURS:
        commands = Path(sys.executable).parent
        settings = {"web_workers": "2"}
        return Server(name, commands, batch_size=batch_size, max_batch_delay_ms=5, settings=settings)
    return Server(name, install_torchserve(), batch_size=batch_size, max_batch_delay_ms=5)


def _measure_processes(server: Server, figures: dict[str, Any], options: Options) -> None:
    figures["first_answer_s"] = server.first_answer_s
    say(f"{server.name}: first answer after {server.first_answer_s:.2f} s")
    figures.update(measure_scaling(server))
    say(f"{server.name}: 1 to {SCALED_TO} workers in {figures['scale_up_s']:.2f} s, "
        f"{figures['worker_mb']:.0f} MB for each further one")  # fmt: skip
    figures["idle_cpu_percent"] = measure_idle_cpu(server, options.idle_seconds)
    say(f"{server.name}: {figures['idle_cpu_percent']:.1f} % of a core when idle")


def _measure_load(server: Server, scenarios: list[Scenario], figures: dict[str, Any], options: Options) -> None:
    for scenario in scenarios:
        run_load(server, scenario, 1)  # warms up
        found = run_load(server, scenario, options.seconds)
        figures["load"][scenario.title] = found
        trouble = found["refused"] + found["broken"] + found["timed_out"]
        say(f"{server.name}: {scenario.title}: {found['per_second']:.0f} requests/s, p50 {found['p50_ms']:.2f} ms, "
            f"p99 {found['p99_ms']:.2f} ms" + (f", {trouble:.0f} FAILED" if trouble else ""))  # fmt: skip


def say(text: str) -> None:
    """Progress, as it comes."""
    print(f"  {text}", flush=True)


# -- all of it


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median over the rounds, per server."""
    summary: dict[str, dict[str, Any]] = {}
    for name, found in rounds.items():
        summary[name] = {
            key: statistics.median(each[key] for each in found)
            for key in ("first_answer_s", "scale_up_s", "worker_mb", "idle_cpu_percent")
        }
        summary[name]["load"] = {
            scenario.title: {
                key: statistics.median(each["load"][scenario.title][key] for each in found)
                for key in ("per_second", "p50_ms", "p99_ms", "refused", "broken", "timed_out")
            }
            for scenario in SCENARIOS
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table, one line per scenario, with the ratio to TorchServe where both ran."""
    both = all(name in summary for name in NAMES)
    names = [name for name in NAMES if name in summary]
    head = ["", *names, *(["ratio"] if both else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def add(title: str, cells: list[str], ratio: float) -> None:
        lines.append(f"| {' | '.join([title, *cells, *([f'{ratio:.1f}'] if both else [])])} |")

    for scenario in SCENARIOS:
        found = [summary[name]["load"][scenario.title] for name in names]
        cells = [
            f"{each['per_second']:,.0f}/s (p50 {each['p50_ms']:.2f} ms, p99 {each['p99_ms']:.2f} ms)"
            + (", with failures" if each["refused"] + each["broken"] + each["timed_out"] else "")
            for each in found
        ]
        add(scenario.title, cells, found[0]["per_second"] / found[-1]["per_second"])
    for title, key, form in (
        ("command to first answer", "first_answer_s", "{:.2f} s"),
        (f"1 to {SCALED_TO} workers with torch", "scale_up_s", "{:.2f} s"),
        ("memory of a further worker (PSS)", "worker_mb", "{:.0f} MB"),
        ("CPU when idle, of one core", "idle_cpu_percent", "{:.1f} %"),
    ):
        values = [float(summary[name][key]) for name in names]
        # Less is better here: the ratio says how many times less.
        add(title, [form.format(value) for value in values], values[-1] / max(values[0], 0.001))
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "gunicorn", "falcon", "httptools")},
    }


def write_results(content: dict[str, Any], machine: dict[str, Any], kind: str = "") -> None:
    """Writes the file of one run into benchmarks/results, named by its time.

    Args:
        content: everything that was measured.
        machine: what `describe_machine` says.
        kind: put before the time in the file's name.
    """
    results = BENCHMARKS / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{kind}{machine['when'].replace(':', '').replace('+0000', 'Z')}.json"
    path.write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n")
    print(f"written to {path.relative_to(PROJECT)}")


def publish(text: str, machine: dict[str, Any], begin_mark: str = TABLE_BEGIN, end_mark: str = TABLE_END) -> None:
    """Puts the figures between two marks of BENCHMARKS.md.

    Args:
        text: the figures.
        machine: what `describe_machine` says.
        begin_mark: the line above them.
        end_mark: the line below them.

    Raises:
        BenchmarkError: the marks are not there.
    """
    page = PROJECT / "BENCHMARKS.md"
    before, begin, rest = page.read_text().partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise BenchmarkError(f"{page.name} lacks the lines {begin_mark!r} and {end_mark!r}.")
    about = (
        f"{machine['when'][:10]}, commit {machine['commit'] or 'none'}: {machine['cores']} cores "
        f"({machine['cpu']}), Linux {machine['kernel']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    )
    page.write_text(f"{before}{begin}\n\n{about}.\n\n{text}\n\n{end}{after}")


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
    """Measures, prints the table and writes the result file."""
    options = parse_options()
    try:
        check_tools(with_java=THEIRS in options.names)
        archive_models()
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
        for number in range(options.rounds):
            # The servers take turns, so that a machine that becomes slower or faster does so for both.
            for name in options.names:
                print(f"==> {name}, round {number + 1} of {options.rounds}", flush=True)
                rounds[name].append(measure(name, options))
        machine = describe_machine()
        summary = summarise(rounds)
        text = table(summary)
        print(f"\n{text}\n")
        write_results({"options": asdict(options), "summary": summary, "rounds": rounds}, machine)
        if options.publish:
            publish(text, machine)
    except (BenchmarkError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
