"""Threads for what plugins do: one that hangs for ever keeps neither its process from ending nor anybody waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonThreads:
    """Up to `most` threads, started as they are needed, that take calls in turn."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._started = self._idle = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Has a thread make a call, which must raise nothing."""
        with self._changed:
            self._calls.append(call)
            if self._idle < len(self._calls) and self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name} {self._started}", daemon=True).start()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._calls:
                    self._changed.wait()
                self._idle -= 1
                call = self._calls.popleft()
            call()


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """The result of a call that is made on a thread of its own, so that it cannot hold up the caller for longer.

    Raises:
        TimeoutError: it has not ended in time; it goes on, and nobody hears of it.
        Exception: what the call raises.
    """
    done = threading.Event()
    result: list[Any] = []

    def make() -> None:
        try:
            result.append((call(), None))
        except BaseException as error:
            result.append((None, error))
        done.set()

    threading.Thread(target=make, name="plugin call", daemon=True).start()
    if not done.wait(limit_s):
        raise TimeoutError(f"no end within {limit_s:g} s")
    value, error = result[0]
    if error is not None:
        raise error
    returned: Result = value
    return returned
