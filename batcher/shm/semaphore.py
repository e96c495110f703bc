"""A named POSIX semaphore whose waits do not depend on the wall clock.

`sem_timedwait`, which is all that `posix_ipc` offers, takes a moment of the wall clock: a clock that is set back by an
hour makes a wait of one second last an hour and a second. glibc 2.30 and newer have `sem_clockwait`, which takes a
moment of the monotonic clock. Where the C library lacks it, a thread ends the waits that last too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from typing import Any

import posix_ipc

_NS = 1_000_000_000
#: How often waits that follow the wall clock are checked, in seconds.
CHECK_S = 0.5


class _TimeSpec(ctypes.Structure):
    """The C library's `struct timespec`."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _load_clock_wait() -> Any:
    """The C library's `sem_clockwait` (glibc 2.30 and newer); None where it has none."""
    try:
        function = _libc.sem_clockwait
    except AttributeError:
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_TimeSpec)]
    return function


_libc = ctypes.CDLL(None, use_errno=True)
_libc.sem_open.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.sem_open.restype = ctypes.c_void_p
_libc.sem_close.argtypes = [ctypes.c_void_p]
_clock_wait = _load_clock_wait()


class Semaphore:
    """An open semaphore. Any number of processes and threads may post it, one thread waits for it.

    Args:
        name: its name, without a slash.

    Raises:
        FileNotFoundError: there is none of that name.
    """

    def __init__(self, name: str) -> None:
        try:
            self._handle = posix_ipc.Semaphore("/" + name)
        except posix_ipc.ExistentialError as error:
            raise FileNotFoundError(errno.ENOENT, "no such semaphore", name) from error
        #: Posts; the C extension's own method, since it is called for every batch.
        self.post = self._handle.release
        # The same semaphore, mapped once in a process: glibc counts how often it was opened.
        self._address = _libc.sem_open(f"/{name}".encode(), 0) if _clock_wait is not None else None
        if _clock_wait is not None and not self._address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), name)
        self._until = _TimeSpec()

    def wait(self, seconds: float) -> bool:
        """Waits until it is posted, at most so long; whether it was. A signal ends the wait, too."""
        seconds = max(0.0, seconds)
        if _clock_wait is None:
            return _alarm.wait(self._handle, seconds)
        until = self._until
        until.seconds, until.nanoseconds = divmod(time.monotonic_ns() + int(seconds * _NS), _NS)
        return bool(_clock_wait(self._address, time.CLOCK_MONOTONIC, until) == 0)

    def close(self) -> None:
        """Lets go of it."""
        self._handle.close()
        if self._address:
            _libc.sem_close(self._address)
            self._address = None

    @staticmethod
    def create(name: str) -> None:
        """Makes a semaphore, of value 0 and mode 0600, for others to open."""
        posix_ipc.Semaphore("/" + name, flags=posix_ipc.O_CREX, mode=0o600).close()

    @staticmethod
    def unlink(name: str) -> None:
        """Removes a semaphore's name if it is there."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_semaphore("/" + name)


class Alarm:
    """Ends waits on the wall clock that have lasted longer than they should, by posting what they wait for.

    For C libraries without `sem_clockwait`. Its thread sleeps by the monotonic clock, and starts with the first wait of
    a process: a fork has none.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._waits: dict[int, tuple[float, Any]] = {}  # by the waiting thread: when it is over, and for what

    def wait(self, handle: Any, seconds: float) -> bool:
        """Waits for a `posix_ipc.Semaphore`; at most CHECK_S longer than asked for, however the clock is set."""
        if self._thread is None or not self._thread.is_alive():
            self._waits.clear()
            self._thread = threading.Thread(target=self._watch, name="semaphore alarm", daemon=True)
            self._thread.start()
        waiter = threading.get_ident()
        self._waits[waiter] = time.monotonic() + seconds, handle
        try:
            handle.acquire(seconds)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        finally:
            self._waits.pop(waiter, None)
        return True

    def _watch(self) -> None:
        """Body of the thread."""
        while True:
            time.sleep(CHECK_S)
            now = time.monotonic()
            for over_at, handle in tuple(self._waits.values()):
                if now > over_at:
                    handle.release()


_alarm = Alarm()
