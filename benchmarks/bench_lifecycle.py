"""`make bench-lifecycle`: requests lost when Kubernetes ends a pod, by wsgi-ts, TorchServe, mosec and LitServe.

    python benchmarks/bench_lifecycle.py                 100,000 requests for each figure: about an hour
    python benchmarks/bench_lifecycle.py --quick         2,000 requests: about six minutes
    python benchmarks/bench_lifecycle.py --only mosec    only this server; may be repeated
    python benchmarks/bench_lifecycle.py --resume FILE   only what an earlier result file lacks; may be repeated
    python benchmarks/bench_lifecycle.py --publish       also put the table into BENCHMARKS.md

Clients send requests over connections that they keep, to the server and to another one beside it. Half of them
through, the server is ended as the kubelet does: SIGTERM, after the preStop hook's sleep where it has one; SIGKILL
after 30 s. New connections get its address for 0, 2 or 10 s more, as long as a cluster may take to tell all its nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from archive_server import OURS, archive_models, our_server
from lifecycle.pods import OtherPod, Service
from reports import failures_told, markdown, report, say
from rivals import litserve, mosec, torchserve
from servers import BenchmarkError, Server

PREFIX = "lifecycle-"
MARKS = ("<!-- lifecycle: written by bench_lifecycle.py --publish -->", "<!-- end of lifecycle -->")
LATE_S = (0, 2, 10)
#: How much longer than its address is known a server serves on, in seconds.
_MARGIN_S = 1
_GRACE_S = 30.0
_CLIENTS = 16
_SHOWN = 3
Figures = dict[str, float]
#: By server, and by how late its address was removed.
Summary = dict[str, dict[int, Figures]]


@dataclass(frozen=True)
class Case:
    """A server, and how it is ended.

    Attributes:
        make: makes it, not yet started, for an address that is known for so many seconds too long.
        has_hook: its pod has a preStop hook that sleeps for longer than that.
    """

    make: Callable[[int], Server]
    has_hook: bool = False


def _ours(late_s: int) -> Server:
    return our_server(models=("echo",), settings={"drain_delay": str(late_s + _MARGIN_S)})


def _torchserve(_: int) -> Server:
    return torchserve.server(batch_size=1, models=("echo",))


def _mosec(_: int) -> Server:
    return mosec.server(batch_size=1, wait_ms=0)


def _litserve(_: int) -> Server:
    return litserve.server(batch_size=1)


CASES = {
    f"{OURS}, drain_delay": Case(_ours),
    torchserve.NAME: Case(_torchserve),
    f"{torchserve.NAME}, preStop": Case(_torchserve, has_hook=True),
    mosec.NAME: Case(_mosec),
    f"{mosec.NAME}, preStop": Case(_mosec, has_hook=True),
    litserve.NAME: Case(_litserve),
    f"{litserve.NAME}, preStop": Case(_litserve, has_hook=True),
}


def measure(case: Case, late_s: int, requests: int) -> Figures:
    """Ends a server among so many requests.

    Returns:
        `requests`, `lost`, `end_s` (seconds from the deletion to the end of its last process), `killed` (1 where it
        took SIGKILL).

    Raises:
        BenchmarkError: it does not start, or has answered nothing.
    """
    with case.make(late_s) as server, OtherPod() as other:
        port = int(server.inference.rpartition(":")[2])
        # Two parts of three go to the server.
        with Service([port, port, other], server.path("echo"), clients=_CLIENTS) as service:
            _wait(lambda: service.outcomes.total() >= requests / 2)
            if not service.answered[port]:
                raise BenchmarkError(f"{server.name} was asked nothing")
            deleted = time.monotonic()
            removal = threading.Timer(late_s, service.remove, (port,))
            removal.start()
            killed = _end(server, late_s + _MARGIN_S if case.has_hook else 0)
            end_s = time.monotonic() - deleted
            removal.join()
            at_end = service.outcomes.total()
            _wait(lambda: service.outcomes.total() >= max(requests, at_end + requests / 10))
    lost = {text: count for text, count in service.outcomes.items() if text != "ok"}
    for text in sorted(lost, key=lambda each: -lost[each])[:_SHOWN]:
        say(f"  {lost[text]} x {text}")
    return {
        "requests": service.outcomes.total(),
        "lost": sum(lost.values()),
        "end_s": end_s,
        "killed": float(killed),
    }


def _end(server: Server, hook_s: float) -> bool:
    """Ends a server as the kubelet does; returns whether it took SIGKILL."""
    processes = server.processes()
    began = time.monotonic()
    time.sleep(hook_s)
    os.kill(server.pid(), signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=max(1.0, _GRACE_S - (time.monotonic() - began)))
    for process in alive:
        process.kill()
    return bool(alive)


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


def known(files: Sequence[Path]) -> Summary:
    """What the result files of earlier runs hold.

    Raises:
        BenchmarkError: one is none.
    """
    found: Summary = {}
    for file in files:
        try:
            for name, figures in json.loads(file.read_text())["summary"].items():
                found[name] = {int(late_s): dict(each) for late_s, each in figures.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BenchmarkError(f"--resume {file}: this is no result file of bench-lifecycle: {error}") from error
    return found


def table(summary: Summary) -> str:
    """The summary as a Markdown table: requests lost of how many."""
    head = ["", *(f"address removed {late_s} s late" if late_s else "at once" for late_s in LATE_S), "ends by itself"]
    lines = []
    for name, found in summary.items():
        cells = [f"{each['lost']:,.0f} of {each['requests']:,.0f}" for each in found.values()]
        lines.append([name, *cells, "no" if any(each["killed"] for each in found.values()) else "yes"])
    return markdown(head, *lines)


def main() -> None:
    """Measures, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description="Counts the requests that are lost when a pod is ended.")
    parser.add_argument("--quick", action="store_true", help="2,000 requests for each figure: a first impression")
    parser.add_argument("--requests", type=int, help="for each figure (default 100,000)")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="only servers with this in the name; may repeat"
    )
    parser.add_argument(
        "--resume", type=Path, action="append", metavar="FILE", help="measure only what this result file lacks"
    )
    parser.add_argument("--publish", action="store_true", help="put the table into BENCHMARKS.md")
    given = parser.parse_args()
    cases = {name: each for name, each in CASES.items() if not given.only or any(text in name for text in given.only)}
    requests = given.requests or (2_000 if given.quick else 100_000)
    with failures_told("bench-lifecycle"):
        if given.publish and given.only:
            raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only away")
        if any(torchserve.NAME in name for name in cases):
            torchserve.check_java()
        archive_models(("echo",))
        earlier = known(given.resume or ())
        summary: Summary = {name: earlier.get(name, {}) for name in cases}
        for name, case in cases.items():
            print(f"==> {name}", flush=True)
            for late_s in LATE_S:
                if late_s in summary[name]:
                    continue
                figures = summary[name][late_s] = measure(case, late_s, requests)
                lost = f"{figures['lost']:.0f} of {figures['requests']:.0f} lost"
                say(f"{late_s} s late: {lost}, ended after {figures['end_s']:.1f} s")
        report(table(summary), {"summary": summary}, PREFIX, MARKS if given.publish else None)


if __name__ == "__main__":
    main()
