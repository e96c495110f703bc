"""The run directory of an engine, which goes with the process that the engine belongs to.

It is locked as long as that process lives. An engine's guard removes it; where the guard was killed as well, whoever
makes the next one on this machine removes what is left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from wsgi_ts.instance.run_directory import AlreadyRunning, RunDirectory, RunDirectoryError, make_private

log = logging.getLogger(__name__)


class Home:
    """One such directory. Make it with `make`, give it back with `remove`."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def make(cls) -> Home:
        """Makes a directory among the temporary files, and removes those of processes that have gone.

        Raises:
            RunDirectoryError: the parent is another user's, or cannot be made.
            OSError: nothing can be written there.
        """
        parent = Path(tempfile.gettempdir(), f"wsgi-ts-{os.getuid()}-engines")
        make_private(parent)
        _sweep(parent)
        name = secrets.token_hex(4)
        # It gets its name when it is locked: without a lock it would be taken for one that is left.
        hidden = parent / f".{name}"
        hidden.mkdir(mode=0o700)
        fd = _try_lock(hidden)
        assert fd >= 0, "a directory that nobody knows cannot be locked"
        path = parent / name
        hidden.rename(path)
        return cls(path, fd)

    def remove(self) -> None:
        """Removes it, with whatever a killed instance has left; the instance has ended.

        Raises:
            RunDirectoryError: a process of the instance cannot be ended.
        """
        if self._lock_fd < 0:
            return
        _clear(self.path)
        os.close(self._lock_fd)
        self._lock_fd = -1


def _sweep(parent: Path) -> None:
    for path in parent.glob("[!.]*"):
        fd = _try_lock(path)
        if fd < 0:
            continue
        try:
            _clear(path)
        except AlreadyRunning:
            # Its guard is just doing it.
            continue
        except RunDirectoryError as error:
            log.warning("What an engine has left is not removed: %s", error)
        finally:
            os.close(fd)


def _clear(path: Path) -> None:
    if path.exists():
        RunDirectory.acquire(path).release()
    shutil.rmtree(path, ignore_errors=True)


def _try_lock(path: Path) -> int:
    """Locks a directory; returns the descriptor that holds the lock, -1 where another process has it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return -1
    return fd
