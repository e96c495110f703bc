"""`make bench-budget`: where the time of a request goes, step by step, and the CPU time, process by process.

    python benchmarks/bench_budget.py                   this working tree: about two minutes
    python benchmarks/bench_budget.py --base 3015f8a    before it the same of another revision
    python benchmarks/bench_budget.py --publish         also put the tables into BENCHMARKS.md

The steps are those that the server tells in the header Server-Timing (`server_timing=true`). It needs `wrk`.
"""

from __future__ import annotations

import argparse
import re
import socket
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil
from archive_server import ArchiveServer, archive_models, our_server
from bench_gate import Tree, revision
from load import WARM_UP_S, Load, check_wrk, cpu_times, run_load
from reports import failures_told, markdown, report, say
from servers import PROJECT, BenchmarkError

MARKS = ("<!-- budget: written by bench_budget.py --publish -->", "<!-- end of budget -->")
#: A lone client's bodies.
BODIES = {"100 B": 100, "100 KB": 100_000, "1 MB": 1_000_000}
#: The steps of Server-Timing, and what the table calls them.
STEPS = {"queue": "queue", "handover": "hand-over", "worker": "model worker"}
REST = "the rest"
LOADS = (
    *(Load(f"100 B, {count} connection{'s' * (count > 1)}", count) for count in (1, 16, 64)),
    Load("100 KB, 4 connections", 4, 100_000),
    Load("1 MB, 4 connections", 4, 1_000_000),
)
#: How processes are called that requests pass, and by which words their titles tell them.
ROLES = {"web workers": "web worker", "batcher": "batcher", "model worker": "model worker"}
OTHERS = "others"
_EMPTY_LINE = b"\r\n\r\n"
_TIMING = re.compile(rb"(\w+);dur=([0-9.]+)")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        base: another revision to measure before; empty for none.
        seconds: length of each run.
        publish: write BENCHMARKS.md.
    """

    base: str
    seconds: float
    publish: bool


class LoneClient:
    """Asks the model `echo` over one connection, each time after the answer.

    Args:
        server: who is asked.
        body_bytes: of each request.
    """

    def __init__(self, server: ArchiveServer, body_bytes: int) -> None:
        address = urlsplit(server.inference)
        self._socket = socket.create_connection((address.hostname, address.port or 80), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"POST {server.path('echo')} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {body_bytes}\r\n\r\n"
        self._request = head.encode() + bytes(body_bytes)
        self._body_bytes = body_bytes
        self._room = bytearray(body_bytes + 65536)

    def ask(self) -> dict[str, float]:
        """Asks once.

        Returns:
            Microseconds: `total`, from the first byte sent to the last one received, and the steps that the server
            tells.

        Raises:
            BenchmarkError: it is another answer than was sent, or tells nothing.
        """
        began = time.perf_counter()
        self._socket.sendall(self._request)
        length, head_end = 0, -1
        while head_end < 0 or length < head_end + len(_EMPTY_LINE) + self._body_bytes:
            more = self._socket.recv_into(memoryview(self._room)[length:])
            if not more:
                raise BenchmarkError("the server has closed the connection.")
            length += more
            if head_end < 0:
                head_end = self._room.find(_EMPTY_LINE, 0, length)
        took_s = time.perf_counter() - began
        head = bytes(self._room[:head_end])
        told = {name.decode(): float(value) * 1000 for name, value in _TIMING.findall(head)}
        if not head.startswith(b"HTTP/1.1 200 ") or not told.keys() >= STEPS.keys():
            raise BenchmarkError(f"no answer that tells its steps:\n{head.decode('latin-1')}")
        return {"total": took_s * 1e6, **told}

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def measure_steps(server: ArchiveServer, seconds: float) -> dict[str, dict[str, float]]:
    """For each body the median of each step, and of what is left of the whole, in microseconds."""
    found = {}
    for title, body_bytes in BODIES.items():
        client = LoneClient(server, body_bytes)
        _ask_for(client, WARM_UP_S)
        asked = _ask_for(client, seconds)
        client.close()
        row = {name: statistics.median(each[key] for each in asked) for key, name in STEPS.items()}
        row[REST] = statistics.median(each["total"] - sum(each[key] for key in STEPS) for each in asked)
        row["total"] = statistics.median(each["total"] for each in asked)
        found[title] = row
        say(f"{title}: " + ", ".join(f"{name} {value:.0f} µs" for name, value in row.items()))
    return found


def _ask_for(client: LoneClient, seconds: float) -> list[dict[str, float]]:
    until = time.monotonic() + seconds
    asked = []
    while time.monotonic() < until:
        asked.append(client.ask())
    return asked


def measure_cpu(server: ArchiveServer, seconds: float) -> dict[str, dict[str, float]]:
    """For each load the CPU time of a request by processes, in microseconds."""
    found = {}
    for load in LOADS:
        run_load(server, load, WARM_UP_S)
        before = cpu_times(server)
        figures = run_load(server, load, seconds)
        after = cpu_times(server)
        row: dict[str, float] = defaultdict(float)
        for process, spent in after.items():
            row[_role(process)] += spent - before.get(process, 0.0)
        found[load.title] = {role: row[role] / figures["requests"] * 1e6 for role in (*ROLES, OTHERS)}
        said = ", ".join(f"{role} {value:.0f} µs" for role, value in found[load.title].items())
        say(f"{load.title}: {said} of CPU a request")
    return found


def _role(process: psutil.Process) -> str:
    try:
        title = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return OTHERS
    return next((role for role, words in ROLES.items() if f"wsgi-ts: {words}" in title), OTHERS)


def measure(tree: Tree, seconds: float) -> dict[str, Any]:
    """Everything about one source tree."""
    print(f"==> {tree.path}: {tree.describe()}", flush=True)

    def server(**settings: str) -> ArchiveServer:
        return our_server(source=tree.path, environment=tree.environment, models=("echo",), settings=settings)

    with server(server_timing="true") as telling:
        steps = measure_steps(telling, seconds)
    with server() as usual:
        return {"steps": steps, "cpu": measure_cpu(usual, seconds)}


def table(head: str, found: dict[str, dict[str, dict[str, float]]]) -> str:
    """One Markdown table; in each cell what the base needs, where there is one, and what this tree does."""
    rows = next(iter(found.values()))
    columns = list(next(iter(rows.values())))
    lines = [
        [title, *(" → ".join(f"{figures[title][column]:,.0f}" for figures in found.values()) for column in columns)]
        for title in rows
    ]
    return markdown([head, *columns], *lines)


def parse_options() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tells where the time of a request goes.")
    parser.add_argument("--base", default="", help="another revision to measure before this working tree")
    parser.add_argument("--seconds", type=float, default=5, help="length of each run (default 5)")
    parser.add_argument("--publish", action="store_true", help="put the tables into BENCHMARKS.md")
    given = parser.parse_args()
    return Options(given.base, given.seconds, given.publish)


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-budget"):
        options = parse_options()
        check_wrk()
        archive_models(("echo",))
        found = {}
        if options.base:
            with revision(options.base) as base:
                found[options.base] = measure(base, options.seconds)
        found["now"] = measure(Tree(PROJECT).compiled(), options.seconds)
        steps = table("µs for a lone client", {name: each["steps"] for name, each in found.items()})
        cpu = table("CPU µs for a request", {name: each["cpu"] for name, each in found.items()})
        content = {"options": asdict(options), "found": found}
        report(f"{steps}\n\n{cpu}", content, "budget-", MARKS if options.publish else None)


if __name__ == "__main__":
    main()
