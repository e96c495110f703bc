"""Load on a server: what a load generator sends and counts, and the CPU time that the server takes for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import grpc_load
import psutil
from servers import BENCHMARKS, BenchmarkError, Server
from workloads import BODIES, body_to_check, is_right

WARM_UP_S = 1


@dataclass(frozen=True)
class Load:
    """Requests to one model over connections that each wait for their answer.

    Attributes:
        title: the line of the table.
        connections: how many; with gRPC, the calls under way at a time.
        body_bytes: of each request to the model `echo`; the others have a body of their own in `workloads`.
        model: the one that is asked.
        heads: "equal" for twelve header lines, "distinct" for twelve that differ in every request.
        grpc: asks TorchServe's gRPC inference API instead of HTTP.
        path: asked in place of the model's, and answers like it.
    """

    title: str
    connections: int
    body_bytes: int = 100
    model: str = "echo"
    heads: str = ""
    grpc: bool = False
    path: str = ""


def measure_load(server: Server, load: Load, seconds: float) -> dict[str, float]:
    """The figures of one run after a second of warming up; see `run_load`."""
    run_load(server, load, WARM_UP_S)
    return run_load(server, load, seconds)


def run_load(server: Server, load: Load, seconds: float) -> dict[str, float]:
    """The figures of one run.

    Returns:
        What the load generator counts: `requests`, `seconds`, `p50_ms`, `p99_ms`, `refused`, `broken`, `timed_out`.
        Also `per_second`, answered requests; `cpu_us` and `client_cpu_us`, the CPU time of all the server's processes
        and of the load generator for each; `client_cpu_percent`, how much of a core the load generator took.

    Raises:
        BenchmarkError: the server's answer is wrong, or there are no figures.
    """
    body = body_to_check(load.model, load.body_bytes)
    if not is_right(load.model, body, server.predict(load.model, body, load.path)):
        raise BenchmarkError(f"{server.name} gives a wrong answer: {load.title}.")
    before, spent = cpu_times(server), _children_cpu_seconds()
    if load.grpc:
        figures = grpc_load.run(server.grpc, load.model, load.body_bytes, load.connections, seconds)
    else:
        figures = _run_wrk(server, load, seconds)
    spent = _children_cpu_seconds() - spent
    answered = max(figures["requests"] - figures["refused"], 1)
    figures["per_second"] = answered / figures["seconds"]
    figures["cpu_us"] = cpu_seconds_between(before, cpu_times(server)) / answered * 1e6
    figures["client_cpu_us"] = spent / answered * 1e6
    figures["client_cpu_percent"] = spent / figures["seconds"] * 100
    return figures


def _run_wrk(server: Server, load: Load, seconds: float) -> dict[str, float]:
    model = load.model
    variables = {
        "HEADERS": "".join(f"{name}: {value}\n" for name, value in server.headers(model).items()),
        "BODY_BYTES": str(load.body_bytes),
        "BODY_HEX": "" if model == "echo" else server.encode(model, BODIES[model]).hex(),
        "HEADS": load.heads,
    }
    done = subprocess.run(
        ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds:g}s", "--timeout", "60s",
         "-s", str(BENCHMARKS / "load.lua"), f"{server.inference}{load.path or server.path(model)}"],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            figures: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return figures
    raise BenchmarkError(f"wrk gave no figures for {load.title}:\n{done.stdout}{done.stderr}")


def failures(figures: dict[str, float]) -> float:
    """How many requests of a run got no answer, or none with the status 200."""
    return figures["refused"] + figures["broken"] + figures["timed_out"]


def describe(figures: dict[str, float]) -> str:
    """One line about a run."""
    failed = failures(figures)
    return (
        f"{figures['per_second']:.0f} requests/s, p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms, "
        f"{figures['cpu_us']:.0f} µs of CPU each, load generator {figures['client_cpu_percent']:.0f} %"
        + (f", {failed:.0f} FAILED" if failed else "")
    )


def measure_idle_cpu(server: Server, seconds: float) -> float:
    """Per cent of one core that all the server's processes use while nobody asks."""
    before = cpu_times(server)
    time.sleep(seconds)
    return cpu_seconds_between(before, cpu_times(server)) / seconds * 100


def memory_mb(server: Server, *, without: str = "") -> float:
    """PSS of all the server's processes, but for those of one name."""
    total_kb = 0
    for process in server.processes():
        try:
            if process.name() == without:
                continue
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            continue
        total_kb += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total_kb / 1000


def cpu_times(server: Server) -> dict[psutil.Process, float]:
    """The CPU seconds, of the user and of the system, that each of the server's processes has used."""
    found = {}
    for process in server.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process] = times.user + times.system
    return found


def cpu_seconds_between(before: dict[psutil.Process, float], after: dict[psutil.Process, float]) -> float:
    """What the processes of `after` have used since `before`."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in after.items())


def _children_cpu_seconds() -> float:
    """What this process's children that have ended used."""
    times = os.times()
    return times.children_user + times.children_system


def check_wrk() -> None:
    """Looks for the load generator; raises BenchmarkError where it is missing."""
    if shutil.which("wrk") is None:
        raise BenchmarkError("wrk is missing (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk).")
