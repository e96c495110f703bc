"""Micro-batching keeps the order, works in its threads, and hands errors to the caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from wsgi_ts.handlers.bundled.base import BaseHandler
from wsgi_ts.handlers.testing import MockContext
from wsgi_ts.handlers.toolkit.micro_batching import MicroBatching


class Handler(BaseHandler):
    """Adds a trace of its phases to each row; fails on rows named "bad"."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def preprocess(self, data: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return [row + "p" for row in data]

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        if any(row.startswith("bad") for row in data):
            raise ValueError("bad row")
        return [row + "i" for row in data]

    def postprocess(self, data: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return [row + "o" for row in data]


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def micro_batching(handler: Handler) -> Iterator[MicroBatching]:
    micro_batching = MicroBatching(handler, micro_batch_size=2)
    yield micro_batching
    micro_batching.shutdown()
    assert micro_batching.thread_groups == {}


ROWS: list[Any] = [str(row) for row in range(7)]
TRACED = [row + "pio" for row in ROWS]


def test_the_order_is_kept(handler: Handler, micro_batching: MicroBatching) -> None:
    context = MockContext()
    micro_batching.parallelism = {"inference": 3}
    assert micro_batching.parallelism == {"preprocess": 1, "inference": 3, "postprocess": 1}
    for _ in range(20):
        assert micro_batching(ROWS, context) == TRACED
    assert {name.partition("-")[0] for name in handler.threads} == {"preprocess", "inference", "postprocess"}
    assert {metric.name for metric in context.metrics.store} == {"HandlerTime"}


@pytest.mark.parametrize(
    ("parallelism", "threads"),
    [
        ({"preprocess": 0}, {"MainThread", "inference-0", "postprocess-0"}),
        ({"inference": 0}, {"preprocess-0", "postprocess-0"}),
        ({"preprocess": 0, "inference": 0, "postprocess": 0}, {"MainThread"}),
    ],
)
def test_a_phase_without_threads_is_still_done(
    handler: Handler, micro_batching: MicroBatching, parallelism: dict[str, int], threads: set[str]
) -> None:
    micro_batching.parallelism = parallelism
    assert micro_batching(ROWS, MockContext()) == TRACED
    assert handler.threads == threads


def test_an_exception_reaches_the_caller_and_the_next_batch_works(micro_batching: MicroBatching) -> None:
    with pytest.raises(ValueError, match="bad row"):
        micro_batching(["0", "1", "bad", "3"], MockContext())
    assert micro_batching(ROWS, MockContext()) == TRACED
    assert micro_batching([], MockContext()) == []


def test_wrong_arguments_are_refused(handler: Handler) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MicroBatching(handler, micro_batch_size=0)
    with pytest.raises(ValueError, match='no phase "predict"'):
        MicroBatching(handler, parallelism={"predict": 1})
    with pytest.raises(ValueError, match="0 or more"):
        MicroBatching(handler, parallelism={"inference": -1})


def test_a_phase_is_told_its_piece_and_other_threads_none() -> None:
    class Asking(Handler):
        def preprocess(self, data: Any) -> Any:
            return [f"{row}{batching.get_micro_batch_idx()}" for row in data]

    batching = MicroBatching(Asking(), micro_batch_size=2, parallelism={"preprocess": 0})
    try:
        assert batching.get_micro_batch_idx() is None
        assert batching(["a", "b", "c"], MockContext()) == ["a0io", "b0io", "c1io"]
        assert batching.get_micro_batch_idx() is None
    finally:
        batching.shutdown()
