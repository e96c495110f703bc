"""Calls of plugins on threads: one that is given up is interrupted, and its thread takes the next."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from wsgi_ts.logs.setup import FileHandler
from wsgi_ts.plugins.threads import DaemonThreads, Late, LimitedCalls, within

LONG_S = 60.0


def spin() -> None:
    while True:
        pass


def assert_within(event: threading.Event) -> None:
    assert event.wait(LONG_S)


def test_a_call_that_is_given_up_ends_and_its_thread_goes_on() -> None:
    threads = DaemonThreads(1, "test")
    begun, ended, after = threading.Event(), threading.Event(), threading.Event()
    call = threads.submit(spin, begun.set, ended.set)
    assert begun.wait(LONG_S)
    threads.submit(after.set)
    time.sleep(0.05)
    assert not ended.is_set()
    call.interrupt()
    assert ended.wait(LONG_S)
    assert after.wait(LONG_S)


def test_an_interruption_before_or_after_the_call_reaches_nobody() -> None:
    threads = DaemonThreads(1, "test")
    goes_on, done = threading.Event(), threading.Event()
    threads.submit(lambda: assert_within(goes_on))
    waits = threads.submit(lambda: None, ended=done.set)
    waits.interrupt()  # it has not begun
    goes_on.set()
    assert done.wait(LONG_S)
    waits.interrupt()
    again = threading.Event()
    threads.submit(again.set)
    assert again.wait(LONG_S)


def run_for_a_moment(turns: int) -> None:
    for _ in range(turns):
        pass


def test_interruptions_at_any_moment_cost_no_thread() -> None:
    """They come while calls begin, run and end; whatever they hit, each call is over once and the thread goes on."""
    threads = DaemonThreads(1, "test")
    begun: list[int] = []
    ended: list[int] = []
    for number in range(3000):
        call = threads.submit(
            partial(time.sleep, 0) if number % 2 else partial(run_for_a_moment, number % 97),
            partial(begun.append, number),
            partial(ended.append, number),
        )
        while not begun or begun[-1] != number:
            time.sleep(0)
        call.interrupt()
    last = threading.Event()
    threads.submit(last.set)
    assert last.wait(LONG_S)
    assert begun == ended == list(range(3000))


def test_one_that_is_ended_while_it_logs_leaves_the_log_to_others(tmp_path: Path) -> None:
    logger = logging.getLogger("test_threads")
    handler = FileHandler(str(tmp_path / "log"), 1 << 20, "", 1, "")
    logger.addHandler(handler)
    logger.propagate = False
    threads = DaemonThreads(1, "test")
    try:
        for _ in range(200):
            begun, ended = threading.Event(), threading.Event()
            call = threads.submit(partial(log_for_ever, logger), begun.set, ended.set)
            assert begun.wait(LONG_S)
            logger.error("meanwhile")  # so that it has to wait for the lock
            call.interrupt()
            assert ended.wait(LONG_S)
            assert handler.lock is not None
            assert handler.lock.acquire(timeout=LONG_S)
            handler.lock.release()
    finally:
        logger.removeHandler(handler)


def log_for_ever(logger: logging.Logger) -> None:
    while True:
        logger.error("again")


def test_who_waits_for_a_call_with_a_limit_has_the_next_one_made() -> None:
    calls = LimitedCalls("test")
    with pytest.raises(TimeoutError, match=r"no end within 0\.05 s"):
        calls.make(0.05, spin)
    deadline = time.monotonic() + LONG_S
    while calls.is_stuck and time.monotonic() < deadline:
        time.sleep(0.01)
    done: list[int] = []
    calls.make(LONG_S, lambda: done.append(1))
    assert done == [1]


def test_what_is_late_alone_is_ended_too() -> None:
    ended = threading.Event()

    def hang() -> None:
        try:
            spin()
        except Late:
            ended.set()
            raise

    with pytest.raises(TimeoutError):
        within(0.05, hang)
    assert ended.wait(LONG_S)
