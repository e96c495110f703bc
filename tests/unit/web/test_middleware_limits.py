"""What a layer of middleware may take, and what of its time is not its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from wsgi_ts.web.middleware_limits import THREADS, Late, LayerThreads, MainThreadLimit, OwnTime


@pytest.fixture
def limit() -> Iterator[MainThreadLimit]:
    before = signal.getsignal(signal.SIGALRM)
    made = MainThreadLimit()
    yield made
    made.end()
    made.close()
    assert signal.getsignal(signal.SIGALRM) == before


def test_what_takes_too_long_on_the_loop_is_interrupted(limit: MainThreadLimit) -> None:
    interrupted: list[int] = []

    def call() -> None:
        limit.begin(0.05)
        try:
            time.sleep(60)
        except Late:
            interrupted.append(1)
        # One that goes on is interrupted again.
        threading.Lock().acquire() and threading.Event().wait(60)

    with pytest.raises(Late):
        try:
            call()
        finally:
            limit.end()
    assert interrupted


def test_the_server_s_own_work_is_not_interrupted(limit: MainThreadLimit) -> None:
    limit.begin(60)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    limit.end()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_who_waits_gives_up_by_the_call_s_own_time() -> None:
    own_time = OwnTime(0.05)
    own_time.enter()
    threading.Timer(0.3, own_time.leave).start()
    began = time.monotonic()
    assert not own_time.wait()
    assert time.monotonic() - began >= 0.3
    with pytest.raises(Late):  # nobody waits any more for what it would begin
        own_time.enter()
    assert not own_time.done()


def test_threads_that_come_back_are_used_again() -> None:
    threads = LayerThreads("layer")
    goes_on = threading.Event()
    for _ in range(THREADS):
        assert not threads.is_stuck
        assert not threads.run(goes_on.wait, OwnTime(0.01))
    assert threads.is_stuck
    goes_on.set()
    assert threads.run(lambda: None, OwnTime(60))
    assert not threads.is_stuck
