"""Threads for what plugins do: one that hangs for ever keeps neither its process from ending nor anybody waiting."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from wsgi_ts.plugins.found import PluginError, said

#: How long a plugin may take to be imported, and the making of an instance of it, in seconds.
LOAD_LIMIT_S = 20.0

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

    One that is late is interrupted, so that it does not take this process's time for ever; what waits in C goes on, and
    nobody hears of it.

    Raises:
        TimeoutError: it has not ended in time.
        PluginError: it raises what is no Exception, such as SystemExit.
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

    thread = threading.Thread(target=make, name="plugin call", daemon=True)
    thread.start()
    if not done.wait(limit_s):
        _interrupt(thread)
        raise TimeoutError(f"no end within {limit_s:g} s")
    value, error = result[0]
    if error is not None:
        raise as_exception(error)
    returned: Result = value
    return returned


class LimitedCalls:
    """Calls of one plugin, one after the other on a thread of their own; the caller waits for none too long."""

    def __init__(self, name: str) -> None:
        self._threads = DaemonThreads(1, name)
        self._late: threading.Event | None = None

    @property
    def is_stuck(self) -> bool:
        """A call that was late has not ended yet."""
        return self._late is not None and not self._late.is_set()

    def make(self, limit_s: float, call: Callable[[], object]) -> None:
        """Makes a call; only while it is not stuck.

        Raises:
            TimeoutError: it has not ended in time, and goes on.
            Exception: what the call raises, see `within`.
        """
        done = threading.Event()
        faults: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                faults.append(error)
            done.set()

        self._threads.submit(run)
        if not done.wait(limit_s):
            self._late = done
            raise TimeoutError(f"no end within {limit_s:g} s")
        if faults:
            raise as_exception(faults[0])


def as_exception(error: BaseException) -> Exception:
    """What code of a plugin has raised, as something that ends neither a thread nor a process."""
    if isinstance(error, Exception):
        return error
    fault = PluginError(said(error))
    fault.__cause__ = error
    return fault


class _TooLate(BaseException):
    """Ends a call that nobody waits for any more; no Exception, since those are often caught."""


def _interrupt(thread: threading.Thread) -> None:
    """Has a thread raise _TooLate where it next executes Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLate))
