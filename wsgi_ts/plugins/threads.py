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


class Late(BaseException):
    """Ends a call that nobody waits for any more; no Exception, since those are often caught and written down."""


def _nothing() -> None:
    """What is to be done where nothing is."""


class ThreadCall:
    """A call that is made on a thread, and that another thread may interrupt.

    Args:
        call: what is called. It must raise nothing but `Late`.
        begun: called before it, `ended` after it; an interruption comes in neither.
    """

    def __init__(self, call: Callable[[], None], begun: Callable[[], None], ended: Callable[[], None]) -> None:
        self._call = call
        self._begun = begun
        self._ended = ended
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._is_interrupted = False

    def run(self) -> None:
        """Makes the call, on the present thread."""
        self._begun()
        try:
            self._is_on(threading.get_ident())
            self._call()
        except Late:
            pass
        try:
            self._is_on(None)
        except Late:  # it came when the call was over; there is only one
            self._is_on(None)
        self._ended()

    def interrupt(self) -> None:
        """Ends the call where it next executes Python, if it runs; what waits in C goes on until it comes back."""
        with self._lock:
            if self._thread is not None and not self._is_interrupted:
                self._is_interrupted = True
                _raise_late(self._thread)

    def _is_on(self, thread: int | None) -> None:
        with self._lock:
            self._thread = thread


class DaemonThreads:
    """Up to `most` threads, started as they are needed, that take calls in turn."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: deque[ThreadCall] = deque()
        self._changed = threading.Condition()
        self._started = self._idle = 0

    def submit(
        self, call: Callable[[], None], begun: Callable[[], None] = _nothing, ended: Callable[[], None] = _nothing
    ) -> ThreadCall:
        """Has a thread make a call, see `ThreadCall`; who gives it up may interrupt it."""
        made = ThreadCall(call, begun, ended)
        with self._changed:
            self._calls.append(made)
            if self._idle < len(self._calls) and self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name} {self._started}", daemon=True).start()
            self._changed.notify()
        return made

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._calls:
                    self._changed.wait()
                self._idle -= 1
                call = self._calls.popleft()
            call.run()


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
        _raise_late(thread.ident or 0)
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
            TimeoutError: it has not ended in time, and is interrupted; what waits in C goes on.
            Exception: what the call raises, see `within`.
        """
        done = threading.Event()
        faults: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                faults.append(error)

        made = self._threads.submit(run, ended=done.set)
        if not done.wait(limit_s):
            self._late = done
            made.interrupt()
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


def _raise_late(thread: int) -> None:
    """Has the thread with this number raise `Late` where it next executes Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Late))
