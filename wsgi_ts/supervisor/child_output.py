"""What a child says on stderr: passed on as it comes, and its last lines kept for whoever has to say why it ended."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

from wsgi_ts.logs.setup import STDERR_VARIABLE

_KEPT_LINES = 20
_READ_BYTES = 65536
_STDERR = 2
#: How long the last lines of a child that has ended are waited for, in seconds.
_JOIN_LIMIT_S = 0.5


class StderrRelay:
    """A pipe to be a child's stderr, whose other end a thread reads until nobody holds it any more.

    Raises:
        OSError, RuntimeError: there is no descriptor or no thread left.

    Attributes:
        fd: what the child gets as its stderr.
        server_fds: the server's own stderr, which the child inherits besides: it logs there.
        environ: tells the child of it.
    """

    def __init__(self, name: str) -> None:
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
