"""What a child says on stderr: passed on as it comes, and its last lines kept for whoever has to say why it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque

from wsgi_ts.logs.setup import STDERR_VARIABLE

log = logging.getLogger(__name__)

_KEPT_LINES = 20
_SHOWN_LINES = 10
_READ_BYTES = 65536
_STDERR = 2
#: How long the last lines of a child that has ended are waited for, in seconds.
_JOIN_LIMIT_S = 0.5


class StderrRelay:
    """A pipe to be a child's stderr, whose other end a thread reads until nobody holds it any more.

    Attributes:
        fd: what the child gets as its stderr.
        server_fds: the server's own stderr, which the child inherits besides: it logs there.
        environ: tells the child of it.
    """

    def __init__(self, name: str) -> None:
        """Starts the thread.

        Args:
            name: of the child, for people.

        Raises:
            OSError, RuntimeError: there is no descriptor or no thread left.
        """
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.server_fds: tuple[int, ...] = ()
        # A server without a stderr logs nowhere.
        with contextlib.suppress(OSError):
            self.server_fds = (os.dup(_STDERR),)
        self.environ = {STDERR_VARIABLE: str(self.server_fds[0])} if self.server_fds else {}
        try:
            source, self.fd = os.pipe()
        except OSError:
            for fd in self.server_fds:
                os.close(fd)
            raise
        self._thread = threading.Thread(target=self._run, args=(source,), name=f"stderr of {name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            os.close(source)
            self.close()
            raise

    def close(self) -> None:
        """Closes this process's copies of what the child has got."""
        for fd in (self.fd, *self.server_fds):
            os.close(fd)

    def last_lines(self) -> list[str]:
        """The last lines of a child that has ended, empty ones left out."""
        self._thread.join(_JOIN_LIMIT_S)
        return [line for line in self._lines if line.strip()]

    def _run(self, source: int) -> None:
        rest = b""
        with open(source, "rb", buffering=0) as pipe:
            while data := pipe.read(_READ_BYTES):
                # A terminal that is gone takes no lines; the child's end is told all the same.
                with contextlib.suppress(OSError):
                    os.write(_STDERR, data)
                *lines, rest = (rest + data).split(b"\n")
                self._lines.extend(line.decode(errors="replace") for line in lines)
                rest = rest[-_READ_BYTES:]
        self._lines.append(rest.decode(errors="replace"))


class FirstLives:
    """A child's lives until it has worked for the first time: who never works is not started for ever.

    Attributes:
        has_worked: whether it has worked at least once.
        gives_up: whether one that never works is given up; not where it worked under the supervisor before this one.
    """

    #: So many lives may end before one has worked: a child may be killed by accident, and a fault repeats itself.
    ALLOWED = 3

    def __init__(self, name: str) -> None:
        """Args: name: of the child, for people."""
        self.has_worked = False
        self.gives_up = True
        self._name = name
        self._failed = 0
        self._relay: StderrRelay | None = None

    def relay(self) -> StderrRelay | None:
        """The stderr of the next life; None from the first that has worked on: it gets the server's own.

        Raises:
            OSError, RuntimeError: there is no descriptor or no thread left.
        """
        self._relay = None if self.has_worked else StderrRelay(self._name)
        return self._relay

    def ended(self, reason: str) -> str | None:
        """Takes note of the end of a life.

        Args:
            reason: how it ended, as "exit code 1".

        Returns:
            Why the child cannot be started, on one line; None where it may be tried again.
        """
        if self.has_worked or not self.gives_up:
            return None
        self._failed += 1
        if self._failed < self.ALLOWED:
            return None
        return self.in_words(f"it ended {self._failed} times before it had worked, at last with {reason}")

    def in_words(self, fault: str) -> str:
        """What is wrong and the child's last line, on one line."""
        lines = self._relay.last_lines() if self._relay is not None else []
        if lines:
            log.error("%s, its last lines: %s", self._name, " | ".join(lines[-_SHOWN_LINES:]))
        said = f"; its last line: {lines[-1].strip()}" if lines else ""
        return f"{self._name} cannot be started: {fault}{said}"
