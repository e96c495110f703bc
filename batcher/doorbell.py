"""Wake-ups between processes: a POSIX semaphore beside an "asleep" word.

A doorbell carries no state: a ring may be lost or doubled, so every wait is limited and every wake re-reads what it
waits for. The word says for which news its owner wants to be woken: 0 while it is awake, else a set of bits that owner
and ringers agree on. Only the sleeper writes it. A semaphore is never used as a lock: one held by a killed process
would never be released.
"""

from __future__ import annotations

import contextlib
import threading

import posix_ipc

#: `sem_timedwait` follows the wall clock, so no single wait is longer than this many seconds.
LONGEST_WAIT_S = 1.0
#: All bits: for doorbells whose owner makes no difference between news.
ANY_NEWS = 0xFF


class Doorbell:
    """One side of a doorbell.

    Args:
        name: the semaphore's name, without a slash.
        words: the view that holds the asleep word.
        index: the asleep word's place in it.
    """

    def __init__(self, name: str, words: memoryview, index: int) -> None:
        self.name = name
        self._semaphore = posix_ipc.Semaphore("/" + name)
        self._words = words
        self._index = index
        # Taking and releasing a lock is a full memory barrier: it stands between a store and the load that must not
        # pass it (x86 lets a later load pass an earlier store; ARM also reorders stores).
        self._barrier = threading.Lock()

    def ring(self, news: int = ANY_NEWS) -> None:
        """Wakes the other side if it sleeps and wants such news. What it should see must have been stored before."""
        with self._barrier:
            pass
        if self._words[self._index] & news:
            self._semaphore.release()

    def force(self) -> None:
        """Wakes the other side whatever its word says."""
        self._semaphore.release()

    def fall_asleep(self, wanted: int = ANY_NEWS) -> None:
        """Tells the other sides for what to ring. Look once more for work after this, then `sleep`."""
        self._words[self._index] = wanted
        with self._barrier:
            pass

    def sleep(self, seconds: float) -> None:
        """Waits for a ring, at most `seconds` and never more than LONGEST_WAIT_S."""
        with contextlib.suppress(posix_ipc.BusyError, posix_ipc.SignalError):
            self._semaphore.acquire(min(seconds, LONGEST_WAIT_S))

    def wake_up(self) -> None:
        """Tells the other sides that no ring is needed."""
        self._words[self._index] = 0

    def close(self) -> None:
        """Gives the semaphore's mapping back."""
        self._semaphore.close()

    @staticmethod
    def create(name: str) -> None:
        """Makes a doorbell's semaphore for others to attach to."""
        posix_ipc.Semaphore("/" + name, flags=posix_ipc.O_CREX, mode=0o600).close()

    @staticmethod
    def unlink(name: str) -> None:
        """Removes a doorbell's name if it is there."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_semaphore("/" + name)
