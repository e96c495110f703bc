"""`make bench-watching`: what it costs wsgi-ts to be watched, on this machine: traces, the console, `/metrics`.

    python benchmarks/bench_watching.py                  everything: about a quarter of an hour
    python benchmarks/bench_watching.py --quick          one short round: about three minutes
    python benchmarks/bench_watching.py --only console   one of traces, console; may be repeated
    python benchmarks/bench_watching.py --publish        also put the tables into BENCHMARKS.md

In each round every way of tracing has a freshly started server, one at a time, and the order changes from round to
round; what is told is CPU time, of all the server's processes. BENCHMARKS.md tells the method.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from archive_server import ArchiveServer, archive_models, our_server
from bench_gate import quartiles
from load import Load, check_wrk, cpu_seconds_between, failures, measure_load
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from reports import failures_told, markdown, report, say
from servers import BenchmarkError, Server, free_ports, http_request

NAMES = ("traces", "console")
PREFIX = "watching-"
MARKS = ("<!-- watching: written by bench_watching.py --publish -->", "<!-- end of watching -->")
LOAD = Load("100 B, 64 connections", 64)
#: Settings that are compared with the first; what {collector} stands for is known when it runs.
WAYS: Mapping[str, Mapping[str, str]] = {
    "as it comes: the slowest and the failed requests are kept": {},
    "nothing is kept (`trace_keep=0`)": {"trace_keep": "0"},
    "1 % of the requests as spans to a collector": {"otlp_endpoint": "{collector}", "trace_sample_ratio": "0.01"},
    "10 % of the requests as spans to a collector": {"otlp_endpoint": "{collector}", "trace_sample_ratio": "0.1"},
    "`server_timing=true`": {"server_timing": "true"},
    "`log_format=json`": {"log_format": "json"},
}
#: Models, workers of each, and how often each model is asked, per second.
SIZES = ((1, 1, 0), (10, 4, 0), (100, 8, 0), (100, 8, 1))
SCRAPES = 100
_AT_A_TIME = 8
#: Of the requests that are sampled the collector is told of so many at least: chance makes them fewer, and losses.
_LEAST_SEEN = 0.9


@dataclass(frozen=True)
class Options:
    """What to measure, and how much.

    Attributes:
        names: the parts.
        rounds: of the ways of tracing.
        seconds: length of each run with a load.
        idle_seconds: how long the console is looked at, and not looked at.
        publish: write BENCHMARKS.md.
    """

    names: tuple[str, ...]
    rounds: int
    seconds: float
    idle_seconds: float
    publish: bool


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A collector that takes whatever spans are sent: its address, and the messages that have come."""
    taken: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            taken.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", taken
        finally:
            server.shutdown()


def requests_in(messages: Sequence[bytes]) -> int:
    """How many requests a collector has been told of."""
    count = 0
    for message in messages:
        for resource in ExportTraceServiceRequest.FromString(message).resource_spans:
            for scope in resource.scope_spans:
                count += sum(span.kind == Span.SPAN_KIND_SERVER for span in scope.spans)
    return count


def measure_ways(options: Options) -> dict[str, list[float]]:
    """The CPU time for a request of each way, in µs, round by round.

    Raises:
        BenchmarkError: requests failed, or spans of sampled ones did not come.
    """
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        print(f"==> traces: round {number + 1} of {options.rounds}", flush=True)
        ways = list(WAYS)
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            with collector() as (address, taken):
                settings = {key: value.format(collector=address) for key, value in WAYS[way].items()}
                with our_server(models=("echo",), folder="watching", settings=settings) as server:
                    figures = measure_load(server, LOAD, options.seconds)
                if failures(figures):
                    raise BenchmarkError(f"{failures(figures):.0f} requests failed: {way}.")
                sampled = float(settings.get("trace_sample_ratio", 0)) * figures["per_second"] * options.seconds
                seen = requests_in(taken)
                if seen < _LEAST_SEEN * sampled or bool(seen) != bool(sampled):
                    raise BenchmarkError(f"spans of {seen} requests have come, not of {sampled:.0f}: {way}.")
            found[way].append(figures["cpu_us"])
            say(f"{way}: {figures['cpu_us']:.1f} µs")
    return found


def measure_console(models: int, workers: int, per_second: int, seconds: float) -> dict[str, float]:
    """What one viewer of the console costs, and what `/metrics` takes.

    Returns:
        Per cent of one core of all the server's processes: `unseen_percent` without a viewer, `seen_percent` with one.
        Milliseconds of one scrape after the other: `scrape_p50_ms`, `scrape_p99_ms`.
    """
    settings = {"enable_model_api": "true"}
    with our_server(models=("echo",), folder="watching", settings=settings) as server:
        server.scale("echo", workers)
        for first in range(1, models, _AT_A_TIME):
            _register(server, range(first, min(models, first + _AT_A_TIME)), workers)
        paths = ["/predictions/echo", *(f"/predictions/echo{number}" for number in range(1, models))]
        with _asked(server, paths, per_second * models):
            unseen = _cpu_percent(server, seconds)
            with _viewer(server):
                seen = _cpu_percent(server, seconds)
        metrics = f"{server.metrics}/metrics"
        took_ms = sorted(_timed_ms(metrics) for _ in range(SCRAPES))
    return {
        "unseen_percent": unseen,
        "seen_percent": seen,
        "scrape_p50_ms": statistics.median(took_ms),
        "scrape_p99_ms": took_ms[-1 - SCRAPES // 100],
    }


def _register(server: ArchiveServer, numbers: Sequence[int], workers: int) -> None:
    """Further models with so many workers each, all at the same time."""
    threads = []
    for number in numbers:
        query = f"url=echo.mar&model_name=echo{number}&initial_workers={workers}&batch_size=32&synchronous=true"
        url = f"{server.management}/models?{query}"
        threads.append(threading.Thread(target=http_request, args=("POST", url, b"")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def _asked(server: Server, paths: Sequence[str], per_second: int) -> Iterator[None]:
    """Asks one model after the other, so often altogether, for as long as it is open."""
    ends = threading.Event()

    def ask() -> None:
        for path in itertools.cycle(paths):
            if ends.wait(1 / per_second):
                return
            server.predict("echo", b"x" * LOAD.body_bytes, path)

    thread = threading.Thread(target=ask)
    if per_second:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        if per_second:
            thread.join()


@contextmanager
def _viewer(server: ArchiveServer) -> Iterator[None]:
    """Looks at the console for as long as it is open, as a page does.

    Raises:
        BenchmarkError: less came than a snapshot a second.
    """
    connection = http.client.HTTPConnection(urlsplit(server.management).netloc, timeout=10)
    connection.request("GET", "/console/events")
    answer = connection.getresponse()
    events = [0]
    ends = threading.Event()

    def read() -> None:
        while not ends.is_set():
            events[0] += answer.read1(1 << 20).count(b"event: snapshot")

    thread = threading.Thread(target=read)
    thread.start()
    began = time.monotonic()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        connection.close()
    if events[0] < 0.8 * (time.monotonic() - began):
        raise BenchmarkError(f"the console got {events[0]} snapshots in {time.monotonic() - began:.0f} s")


def _cpu_percent(server: Server, seconds: float) -> float:
    """Per cent of one core that all the server's processes take, after some seconds for what has just begun."""
    time.sleep(3)
    before = _run_seconds(server)
    time.sleep(seconds)
    return cpu_seconds_between(before, _run_seconds(server)) / seconds * 100


def _run_seconds(server: Server) -> dict[psutil.Process, float]:
    """How long each of the server's processes has run: in nanoseconds in /proc, where CPU times are in hundredths."""
    found = {}
    for process in server.processes():
        try:
            tasks = [f"/proc/{process.pid}/task/{thread.id}/schedstat" for thread in process.threads()]
            found[process] = sum(int(Path(task).read_text().split()[0]) for task in tasks) / 1e9
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
    return found


def _timed_ms(url: str) -> float:
    began = time.monotonic()
    http_request("GET", url)
    return (time.monotonic() - began) * 1000


def tables(ways: Mapping[str, Sequence[float]], consoles: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the ways of tracing, with the change against the first, and one of the console."""
    parts = []
    if ways:
        first = ways[next(iter(WAYS))]
        lines = []
        for way, found in ways.items():
            changes = [(now / base - 1) * 100 for now, base in zip(found, first, strict=True)]
            low, middle, high = quartiles(changes)
            change = "" if found is first else f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
            lines.append((way, f"{statistics.median(found):.1f} µs", change))
        parts.append(markdown((LOAD.title, "CPU time each", "change (quartiles)"), *lines))
    if consoles:
        head = ("Models x workers", "CPU, nobody looks", "with one viewer", "`/metrics` p50", "p99")
        parts.append(markdown(head, *(
            (
                title, f"{row['unseen_percent']:.2f} %", f"{row['seen_percent'] - row['unseen_percent']:+.2f} %",
                f"{row['scrape_p50_ms']:.1f} ms", f"{row['scrape_p99_ms']:.1f} ms",
            )
            for title, row in consoles.items()
        )))  # fmt: skip
    return "\n\n".join(parts)


def measure_consoles(seconds: float) -> dict[str, dict[str, float]]:
    """The figures of each size, by its title."""
    found = {}
    for models, workers, per_second in SIZES:
        title = f"{models} x {workers}" + (", each asked once a second" if per_second else "")
        print(f"==> console: {title}", flush=True)
        found[title] = measure_console(models, workers, per_second, seconds)
        say(", ".join(f"{key} {value:.2f}" for key, value in found[title].items()))
    return found


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published.
    """
    parser = argparse.ArgumentParser(description="Measures what it costs wsgi-ts to be watched.")
    parser.add_argument("--only", action="append", choices=NAMES, help="only this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="one short round: a first impression")
    parser.add_argument("--rounds", type=int, help="rounds of the ways of tracing (default 12)")
    parser.add_argument("--publish", action="store_true", help="put the tables into BENCHMARKS.md")
    given = parser.parse_args()
    if given.publish and given.only:
        raise BenchmarkError("--publish replaces all figures in BENCHMARKS.md: leave --only away")
    return Options(
        names=tuple(name for name in NAMES if not given.only or name in given.only),
        rounds=given.rounds or (1 if given.quick else 12),
        seconds=2 if given.quick else 4,
        idle_seconds=5 if given.quick else 30,
        publish=given.publish,
    )


def main() -> None:
    """Measures, and reports."""
    with failures_told("bench-watching"):
        options = parse_options()
        check_wrk()
        archive_models(("echo",))
        ways = measure_ways(options) if "traces" in options.names else {}
        consoles = measure_consoles(options.idle_seconds) if "console" in options.names else {}
        content = {"options": asdict(options), "traces": ways, "console": consoles}
        report(tables(ways, consoles), content, PREFIX, MARKS if options.publish else None)


if __name__ == "__main__":
    main()
