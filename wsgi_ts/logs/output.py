"""Where log bytes go: files appended to by many processes, stdout, and the thread that writes with `async_logging`.

Each line is part of one `write` to a descriptor opened with O_APPEND, so the lines of different processes never mix.
An output that cannot be written (full disk, closed terminal) loses lines, counts them, and never stops a server.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path

log = logging.getLogger(__name__)

#: How much the background thread may be behind, in bytes; what comes on top is lost and counted.
MAX_WAITING_BYTES = 8 * 1024 * 1024
#: How long the end of a process waits for its background thread, in seconds.
FLUSH_LIMIT_S = 5.0
_FILE_MODE = 0o644


class Output:
    """A descriptor that takes whole lines, -1 for nowhere; `lost` of them could not be written."""

    def __init__(self, fd: int) -> None:
        self.lost = 0
        self._fd = fd

    @property
    def is_open(self) -> bool:
        """Whether lines go anywhere."""
        return self._fd >= 0

    def write(self, data: bytes) -> None:
        """Appends whole lines, now or by the background thread."""
        if _background is None:
            self.write_now(data)
        else:
            _background.put(self, data)

    def write_now(self, data: bytes) -> None:
        """Appends whole lines with one system call (more only where the kernel takes less at once)."""
        if self._fd < 0:
            return
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            self.lost += data.count(b"\n")


class LogFile(Output):
    """One file that is appended to. If it cannot be opened it stays closed, and its lines go nowhere.

    Attributes:
        path: its name.
        began_at: when its content was last known to be begun, in seconds since the epoch: of a file that was there
            already only the last write is known.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(-1)
        self.path = path
        self.began_at = time.time()
        self.reopen()
        if self._fd >= 0 and (status := os.fstat(self._fd)).st_size:
            self.began_at = status.st_mtime

    def reopen(self) -> None:
        """Opens the file under its name again, after somebody has moved it away."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, flags, _FILE_MODE)
        except OSError:
            return
        if self._fd < 0:
            self._fd = fd
            return
        # In one step: another thread that is about to write finds the old file or the new one, never a closed number.
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        """Closes it; further lines go nowhere."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class BackgroundWriter:
    """Writes the lines of all outputs of a process, in order, on a thread that starts with the first of them.

    Lines beyond `max_waiting_bytes` are lost, and counted in their output and here.
    """

    def __init__(self, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self.lost = 0
        self._told = 0
        self._limit = max_waiting_bytes
        # Reentrant: a signal handler may log while its own thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[Output, bytes]] = deque()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    def put(self, output: Output, data: bytes) -> None:
        """Hands over lines; never waits for a disk."""
        with self._changed:
            if self._waiting_bytes + len(data) > self._limit:
                lines = data.count(b"\n")
                output.lost += lines
                self.lost += lines
                return
            self._waiting.append((output, data))
            self._waiting_bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, limit_s: float = FLUSH_LIMIT_S) -> bool:
        """Waits until everything is written, at most `limit_s` seconds; whether it is."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while self._waiting_bytes and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._waiting_bytes

    def stop(self, limit_s: float = FLUSH_LIMIT_S) -> None:
        """Writes what is left, and ends the thread."""
        self.flush(limit_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait()
                output, data = self._waiting.popleft()
            output.write_now(data)
            with self._changed:
                self._waiting_bytes -= len(data)
                is_done = not self._waiting_bytes
                if is_done:
                    self._changed.notify_all()
            if is_done:
                # Without the lock: who logs has a handler's lock, and waits for this one.
                self._tell_lost()

    def _tell_lost(self) -> None:
        if self.lost != self._told:
            lost, self._told = self.lost - self._told, self.lost
            log.warning("%d log lines are lost: they came faster than the disk or stdout takes them", lost)


#: Set while `async_logging` is on in this process.
_background: BackgroundWriter | None = None


def write_in_background(wanted: bool) -> None:
    """Switches the background thread of this process on or off; off writes what is left first."""
    global _background
    old, _background = _background, BackgroundWriter() if wanted else None
    if old is not None:
        old.stop()


def flush_outputs() -> None:
    """Waits until all lines are written. For who is about to leave with `os._exit`."""
    if _background is not None:
        _background.flush()


def _after_fork() -> None:
    """A fork has no copy of the thread, and must not write the parent's lines again."""
    global _background  # noqa: PLW0603
    if _background is not None:
        _background = BackgroundWriter()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(write_in_background, False)
