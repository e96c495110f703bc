"""How long a layer of middleware may take: on the loop's thread, where predictions pass it, and on any other.

On the loop's thread a timer interrupts it: whatever it waits for in Python ends with `Late`, and nothing of it stays
behind. Anywhere else it is called on a thread of its own, and interrupted there; what waits in C is left to itself.
What the server itself does inside it counts in neither case.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from wsgi_ts.plugins.threads import DaemonThreads, Late

#: What a call may take where the factory has no `timeout_s`, and at most where predictions pass it, in seconds.
TIMEOUT_S = 5.0
LOOP_TIMEOUT_S = 1.0
#: One that catches the interruption and goes on is interrupted again after so many seconds.
_AGAIN_S = 0.1
#: Threads of one layer.
THREADS = 8


class MainThreadLimit:
    """A limit for what runs on the main thread, which is the loop's. To be made there; there is one timer in a process.

    It has SIGALRM from when it is made until it is closed.
    """

    def __init__(self) -> None:
        self._is_on = False
        self._before = signal.signal(signal.SIGALRM, self._ring)

    def begin(self, limit_s: float) -> None:
        """From now on the present call may take so long."""
        self._is_on = True
        signal.setitimer(signal.ITIMER_REAL, limit_s, _AGAIN_S)

    def end(self) -> None:
        """It is over, or does something that takes the time it takes."""
        self._is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self) -> None:
        """Gives SIGALRM back to what had it before; after `end`."""
        signal.signal(signal.SIGALRM, self._before)

    def _ring(self, *_: Any) -> None:
        if self._is_on:
            raise Late


class OwnTime:
    """How long a call on a thread has done something of its own; who waits for it gives it up by that.

    Args:
        limit_s: how long it may, at a time.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._since = time.monotonic()
        self._is_inside = self._is_done = self._is_given_up = False

    def enter(self) -> None:
        """What follows is the server's, and takes the time it takes.

        Raises:
            Late: nobody waits any more: it must not be begun.
        """
        with self._changed:
            if self._is_given_up:
                raise Late
            self._is_inside = True

    def leave(self) -> None:
        """The call goes on with what is its own."""
        with self._changed:
            self._is_inside, self._since = False, time.monotonic()

    def done(self) -> bool:
        """The call has ended; returns whether somebody still waited for it."""
        with self._changed:
            self._is_done = True
            self._changed.notify()
            return not self._is_given_up

    def wait(self) -> bool:
        """Waits until the call has ended; False where it has taken too long and is given up."""
        with self._changed:
            while not self._is_done:
                left_s = self._limit_s - (0.0 if self._is_inside else time.monotonic() - self._since)
                if left_s <= 0:
                    self._is_given_up = True
                    return False
                self._changed.wait(left_s)
            return True


class LayerThreads:
    """The threads of one layer. Any thread may call."""

    def __init__(self, name: str) -> None:
        self._pool = DaemonThreads(THREADS, f"middleware {name}")
        self._lock = threading.Lock()
        self._late = 0

    @property
    def is_stuck(self) -> bool:
        """All of them are in calls that were given up."""
        return self._late >= THREADS

    def run(self, call: Callable[[], None], own_time: OwnTime) -> bool:
        """Makes a call, which must raise nothing; False where it took too long and goes on by itself."""

        def ended() -> None:
            if not own_time.done():
                with self._lock:
                    self._late -= 1

        made = self._pool.submit(call, ended=ended)
        if own_time.wait():
            return True
        with self._lock:
            self._late += 1
        made.interrupt()
        return False
