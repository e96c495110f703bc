"""What grows, and what is measured at each size: one function for each axis, with a freshly started server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from archive_server import ArchiveServer, archive, archive_models, our_server
from load import Load, cpu_seconds_between, cpu_times, measure_idle_cpu, measure_load
from servers import BENCHMARKS, http_request

from growth.clients import idle_connections, read_streams

#: The figures of one point; the report takes the median of each over the rounds.
Figures = dict[str, float]
STREAMS_MODEL = "ticks"
MOST_STREAMS = 200
_REGISTERED = 100
_AT_A_TIME = 8
_SCALED_TO = 16
_ALONE = Load("1 connection", 1)
_FEW = Load("16 connections", 16)
_MANY = Load("64 connections", 64)


@dataclass(frozen=True)
class Axis:
    """Something that grows.

    Attributes:
        title: of the plot and the table.
        load: what is asked for meanwhile, in words.
        sizes: where it is measured.
        measure: the figures at one size, with runs of so many seconds.
    """

    title: str
    load: str
    sizes: tuple[int, ...]
    measure: Callable[[int, float], Figures]


def make_archives() -> None:
    """The echo, and the streams."""
    archive_models(("echo",))
    config = {
        "minWorkers": 1, "maxWorkers": 1, "batchSize": MOST_STREAMS, "maxBatchDelay": 1,
        "continuousBatching": True, "jobQueueSize": 2 * MOST_STREAMS,
    }  # fmt: skip
    archive(STREAMS_MODEL, BENCHMARKS / "growth" / "ticks_handler.py", config=config)


def _server(web_workers: int = 2) -> ArchiveServer:
    settings = {"enable_model_api": "true"}
    return our_server(web_workers=web_workers, models=("echo",), folder="growth", settings=settings)


def _web_workers(count: int, seconds: float) -> Figures:
    with _server(web_workers=count) as server:
        return measure_load(server, _MANY, seconds)


def _models(count: int, seconds: float) -> Figures:
    """Asks one of so many models, each of which has a worker."""
    with _server() as server:
        for number in range(1, count):
            _register(server, number)
        figures = measure_load(server, _FEW, seconds)
        alone = measure_load(server, _ALONE, seconds)
        return {**figures, "alone_p50_ms": alone["p50_ms"], "idle_cpu_percent": measure_idle_cpu(server, seconds)}


def _model_workers(count: int, seconds: float) -> Figures:
    with _server() as server:
        server.scale("echo", count)
        return {**measure_load(server, _MANY, seconds), "idle_cpu_percent": measure_idle_cpu(server, seconds)}


def _idle_connections(count: int, seconds: float) -> Figures:
    with _server() as server, idle_connections(server, count):
        return {**measure_load(server, _FEW, seconds), "idle_cpu_percent": measure_idle_cpu(server, seconds)}


def _streams(count: int, seconds: float) -> Figures:
    with _server() as server, server.registered(STREAMS_MODEL):
        before = cpu_times(server)
        figures = read_streams(server, STREAMS_MODEL, count, seconds)
        spent = cpu_seconds_between(before, cpu_times(server))
        return {**figures, "cpu_us": spent / max(1.0, figures["per_second"] * seconds) * 1e6}


AXES = {
    "web-workers": Axis("Web workers", "64 connections", (1, 2, 3, 4), _web_workers),
    "models": Axis("Models registered, a worker each", "16 connections to one", (1, 10, 100, 500), _models),
    "model-workers": Axis("Workers of the model", "64 connections", (1, 2, 4, 8, 16), _model_workers),
    "connections": Axis("Open idle connections", "16 others", (0, 1000, 5000), _idle_connections),
    "streams": Axis("Streams", "50 chunks/s each", (1, 10, 50, 100, 200), _streams),
}


def measure_steps() -> Figures:
    """What is done once and not per request, in seconds: first answer, registering, scaling."""
    with _server() as server:
        figures = {"first_answer_s": server.first_answer_s}
        # Not counted: the first one imports what the others find.
        _register(server, 0)
        figures["one_by_one_s"] = _timed(lambda: _register_all(server, map))
    with _server() as server, ThreadPoolExecutor(_AT_A_TIME) as pool:
        _register(server, 0)
        figures["at_a_time_s"] = _timed(lambda: _register_all(server, pool.map))
        figures["scale_up_s"] = server.scale("echo", _SCALED_TO)
    return figures


STEPS = {
    "first_answer_s": "command to first answer of a model that needs no torch",
    "one_by_one_s": f"registering {_REGISTERED} models with a worker each, one after the other",
    "at_a_time_s": f"the same, {_AT_A_TIME} calls at a time",
    "scale_up_s": f"1 to {_SCALED_TO} workers",
}


def points(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """All points of some axes."""
    for name in names:
        for size in AXES[name].sizes:
            yield name, size


def _register(server: ArchiveServer, number: int) -> None:
    query = f"url=echo.mar&model_name=echo{number}&initial_workers=1&batch_size=32&synchronous=true"
    http_request("POST", f"{server.management}/models?{query}", b"")


def _register_all(server: ArchiveServer, each: Callable[..., Iterable[None]]) -> None:
    """Registers models 1 to _REGISTERED; `each` is `map`, or what calls several at a time."""
    for _ in each(lambda number: _register(server, number), range(1, _REGISTERED + 1)):
        pass


def _timed(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started
