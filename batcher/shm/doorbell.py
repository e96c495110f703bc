"""Wake-ups between processes: a POSIX semaphore beside an "asleep" word.

A doorbell carries no state: a ring may be lost or doubled, so every wait is limited and every wake re-reads what it
waits for. The word says for which news its owner wants to be woken: 0 while it is awake, else a set of bits that owner
and ringers agree on. Only the sleeper writes it. A semaphore is never used as a lock: one held by a killed process
would never be released.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from wsgi_ts.batcher.shm.semaphore import Semaphore

#: No single sleep is longer than this many seconds, so that a ring that was lost costs no more.
LONGEST_WAIT_S: Final = 1.0
#: Nor one of an owner that ends with all who ring for it, so that no ring is lost while it lives: it may be one of
#: hundreds, each of which takes a little of a core whenever it looks.
LONGEST_IDLE_WAIT_S: Final = 5.0
#: All bits: for doorbells whose owner makes no difference between news.
ANY_NEWS: Final = 0xFF


class Doorbell:
    """One side of a doorbell.

    Args:
        name: the semaphore's name, without a slash.
        words: the view that holds the asleep word.
        index: the asleep word's place in it.
        longest_wait_s: limit of a single sleep, in seconds.
    """

    def __init__(self, name: str, words: memoryview, index: int, *, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self.name = name
        self._longest_wait_s = longest_wait_s
        self._semaphore = Semaphore(name)
        self._words = words
        self._index = index
        # Taking and releasing a lock is a full memory barrier (README, "Memory order"): it stands between a store and
        # the load that must not pass it.
        self._barrier = threading.Lock()

    def ring(self, news: int = ANY_NEWS) -> None:
        """Wakes the other side if it sleeps and wants such news. What it should see must have been stored before."""
        with self._barrier:
            pass
        if self._words[self._index] & news:
            self._semaphore.post()

    def force(self) -> None:
        """Wakes the other side whatever its word says."""
        self._semaphore.post()

    def wait(
        self,
        ready: Callable[[], bool],
        limit_s: float = math.inf,
        *,
        spin_ns: int = 0,
        wanted: int = ANY_NEWS,
        sleep: Callable[[float], bool] | None = None,
    ) -> bool:
        """Waits until something is there, and says whether it is.

        The order is what makes it safe: say that one sleeps, pass a barrier, look once more, sleep. Whoever brings news
        stores them, passes a barrier, and then looks whether one sleeps: one of the two sees the other.

        Args:
            ready: whether what is waited for is there; asked again after each ring, and after each sleep.
            limit_s: how long to wait at most, in seconds.
            spin_ns: how long to spin, at first and after each ring, before sleeping. Being woken costs more than
                a short spin; others that want the core get it.
            wanted: for what to be woken.
            sleep: sleeps so many seconds in place of `self.sleep`, and returns whether it was woken: for an owner that
                waits for other things, too, and has a thread that hears the rings.
        """
        sleep = sleep or self.sleep
        clock = time.monotonic_ns
        now = clock()
        end = now + limit_s * 1e9
        spin_until = now + spin_ns
        while not ready():
            now = clock()
            if now >= end:
                return False
            if now < spin_until:
                os.sched_yield()
                continue
            self.fall_asleep(wanted)
            if not ready() and sleep((end - now) / 1e9):
                spin_until = clock() + spin_ns
            self.wake_up()
        return True

    def fall_asleep(self, wanted: int = ANY_NEWS) -> None:
        """Tells the other sides for what to ring. Look once more for work after this, then `sleep`."""
        self._words[self._index] = wanted
        with self._barrier:
            pass

    def sleep(self, seconds: float) -> bool:
        """Waits for a ring, at most `seconds` and never more than `longest_wait_s`; whether it rang."""
        return self._semaphore.wait(min(seconds, self._longest_wait_s))

    def wake_up(self) -> None:
        """Tells the other sides that no ring is needed."""
        self._words[self._index] = 0

    def close(self) -> None:
        """Gives the semaphore's mapping back."""
        self._semaphore.close()

    @staticmethod
    def create(name: str) -> None:
        """Makes a doorbell's semaphore for others to attach to."""
        Semaphore.create(name)

    @staticmethod
    def unlink(name: str) -> None:
        """Removes a doorbell's name if it is there."""
        Semaphore.unlink(name)
