"""Load on a server: what wrk sends and counts, and the CPU time that the server takes for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass

import psutil
from servers import BENCHMARKS, BenchmarkError, Server


@dataclass(frozen=True)
class Load:
    """Requests to one model over connections that each wait for their answer.

    Attributes:
        title: the line of the table.
        connections: how many.
        body_bytes: of each request; the server must answer the model `echo` with them.
        model: the one that is asked.
        body: what is sent instead of `body_bytes` of x.
        distinct_heads: every request differs from the others in its head.
    """

    title: str
    connections: int
    body_bytes: int = 100
    model: str = "echo"
    body: bytes = b""
    distinct_heads: bool = False


WARM_UP_S = 1


def measure_load(server: Server, load: Load, seconds: float) -> dict[str, float]:
    """The figures of one run of wrk after a second of warming up; see `run_load`."""
    run_load(server, load, WARM_UP_S)
    return run_load(server, load, seconds)


def run_load(server: Server, load: Load, seconds: float) -> dict[str, float]:
    """The figures of one run of wrk.

    Returns:
        What load.lua prints, and `per_second`, the answered requests, and `cpu_us`, the CPU time of all the server's
        processes for each of them.

    Raises:
        BenchmarkError: the server does not echo, or wrk gave no figures.
    """
    if load.model == "echo":
        body = os.urandom(load.body_bytes)
        if server.predict("echo", body) != body:
            raise BenchmarkError(f"{server.name} answers {load.title} with something else than what was sent.")
    before = cpu_times(server)
    done = subprocess.run(
        ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds:g}s", "--timeout", "60s",
         "-s", str(BENCHMARKS / "load.lua"), f"{server.inference}{server.path(load.model)}"],
        env={**os.environ, **_variables(server, load)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = cpu_times(server)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            figures: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            answered = figures["requests"] - figures["refused"]
            figures["per_second"] = answered / figures["seconds"]
            figures["cpu_us"] = cpu_seconds_between(before, after) / max(answered, 1) * 1e6
            return figures
    raise BenchmarkError(f"wrk gave no figures for {load.title}:\n{done.stdout}{done.stderr}")


def _variables(server: Server, load: Load) -> dict[str, str]:
    """What load.lua reads."""
    return {
        "HEADERS": "".join(f"{name}: {value}\n" for name, value in server.headers.items()),
        "BODY_BYTES": str(load.body_bytes),
        "BODY_HEX": load.body.hex(),
        "DISTINCT_HEADS": "1" if load.distinct_heads else "",
    }


def failures(figures: dict[str, float]) -> float:
    """How many requests of a run got no answer, or none with the status 200."""
    return figures["refused"] + figures["broken"] + figures["timed_out"]


def describe(figures: dict[str, float]) -> str:
    """One line about a run."""
    failed = failures(figures)
    return (
        f"{figures['per_second']:.0f} requests/s, p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms, "
        f"{figures['cpu_us']:.0f} µs of CPU each" + (f", {failed:.0f} FAILED" if failed else "")
    )


def measure_idle_cpu(server: Server, seconds: float) -> float:
    """Per cent of one core that all the server's processes use while nobody asks."""
    before = cpu_times(server)
    time.sleep(seconds)
    return cpu_seconds_between(before, cpu_times(server)) / seconds * 100


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


def check_wrk() -> None:
    """Looks for the load generator; raises BenchmarkError where it is missing."""
    if shutil.which("wrk") is None:
        raise BenchmarkError("wrk is missing (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk).")
