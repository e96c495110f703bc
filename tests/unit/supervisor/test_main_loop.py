"""The supervisor's main loop: what other threads ask of it, and what it does with errors."""

from __future__ import annotations

import os
import selectors
import threading
from collections.abc import Iterator

import pytest

from wsgi_ts.errors import BadRequest, ServiceUnavailable
from wsgi_ts.supervisor.loop import MainLoop


@pytest.fixture
def loop() -> Iterator[MainLoop]:
    loop = MainLoop()
    yield loop
    loop.close()


def nothing(now: float) -> None:
    pass


class TestCall:
    def test_the_result_comes_from_the_loops_thread(self, loop: MainLoop) -> None:
        found: list[object] = []
        caller = threading.Thread(target=lambda: found.append(loop.call(threading.get_ident)))
        caller.start()
        while caller.is_alive():
            loop.turn(0.05, nothing)
        assert found == [threading.get_ident()]

    def test_an_error_goes_to_the_caller_and_not_to_the_loop(self, loop: MainLoop) -> None:
        found: list[object] = []

        def refuse() -> None:
            raise BadRequest("no")

        def ask() -> None:
            with pytest.raises(BadRequest, match="no"):
                loop.call(refuse)
            found.append("told")

        caller = threading.Thread(target=ask)
        caller.start()
        while caller.is_alive():
            assert loop.turn(0.05, nothing)
        assert found == ["told"]

    def test_a_loop_that_does_not_turn_is_busy(self, loop: MainLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("wsgi_ts.supervisor.loop._CALL_LIMIT_S", 0.01)
        with pytest.raises(ServiceUnavailable):
            loop.call(lambda: None)


def test_what_is_posted_ends_the_wait(loop: MainLoop) -> None:
    done: list[int] = []
    poster = threading.Timer(0.05, lambda: loop.post(lambda: done.append(1)))
    poster.start()
    while not done:
        # The test's limit is the run's: without the wake-up this would wait for ever.
        loop.turn(1e6, nothing)


def test_an_event_whose_key_was_taken_back_in_the_same_turn_is_none(loop: MainLoop) -> None:
    """A death that closes a channel must not have the channel's event handled, too."""
    calls: list[int] = []
    pipes = [os.pipe(), os.pipe()]
    readers = [reader for reader, _ in pipes]

    def on_ready(other: int) -> None:
        calls.append(other)
        loop.selector.unregister(other)

    for reader, other in zip(readers, reversed(readers), strict=True):
        loop.selector.register(reader, selectors.EVENT_READ, lambda other=other: on_ready(other))
    for _, writer in pipes:
        os.write(writer, b"x")
    assert loop.turn(1.0, nothing)
    assert len(calls) == 1
    for fd in (fd for pipe in pipes for fd in pipe):
        os.close(fd)


def test_a_loop_that_fails_again_and_again_gives_up(loop: MainLoop) -> None:
    done: list[int] = []

    def fail(now: float) -> None:
        raise OSError("broken")

    loop.post(lambda: done.append(1))
    assert [loop.turn(0.0, fail) for _ in range(5)] == [True, True, True, True, False]
    assert done == [1]
