"""How a process hands over the records of requests and batches: one line of JSON each, and never a wait.

The supervisor keeps records of slow and failed requests (`store`), the exporter turns those of sampled ones into spans
(`exporter`). Where nobody listens, or they do not keep up, a record is lost and counted, and nothing else happens. A
stream and no datagrams: of those the kernel may hold as few as ten.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from wsgi_ts.json_lines import encode

#: What may wait in the sender for room in the kernel's buffer; what comes then is lost.
MOST_WAITING: Final = 262144
#: A longer line is no record.
MOST_LINE: Final = 1024 * 1024
#: How long the next try of a sender waits that has found nobody, in seconds.
_RETRY_S: Final = 1.0
_READ_BYTES: Final = 262144


class Post:
    """Sends records to a socket in the run directory.

    Attributes:
        gather: so many bytes wait to be sent together; who sets a number above 0 calls `flush` now and then.
        lost: how many records nobody has taken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._sock: socket.socket | None = None
        self.gather = 0
        self._waiting: list[bytes] = []
        self._bytes = 0
        #: How many of them the kernel had no room for.
        self._refused = 0
        self._retry_at = 0.0
        self.lost = 0

    def send(self, record: Any) -> None:
        """Sends one record, or loses it: whatever JSON can hold."""
        if self._bytes > MOST_WAITING or not self._is_connected():
            self.lost += 1
        else:
            line = encode(record)
            self._waiting.append(line)
            self._bytes += len(line)
        # Where there was no room, a try for each further record would copy all that waits each time.
        if self._bytes >= self._refused + self.gather:
            self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the kernel has room."""
        if not self._waiting or self._sock is None:
            return
        data = b"".join(self._waiting)
        try:
            rest = data[self._sock.send(data) :]
        except BlockingIOError:
            rest = data
        except OSError:  # who listened has ended, and with it what was under way
            self.close()
            return
        self._keep(rest)

    def close(self) -> None:
        """Gives the socket back."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        self._keep(b"")

    def _keep(self, rest: bytes) -> None:
        self._waiting = [rest] if rest else []
        self._bytes = self._refused = len(rest)

    def _is_connected(self) -> bool:
        if self._sock is not None:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + _RETRY_S
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return False
        self._sock = sock
        return True


class Inlet:
    """Where records arrive: a socket for this user only, and whoever is connected to it.

    Args:
        path: of the socket; what had that name before is replaced.
        selector: its owner's, who calls the data of each key whose descriptor is ready.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(self, path: Path, selector: selectors.BaseSelector, take: Callable[[bytes], None]) -> None:
        self._path = path
        self._selector = selector
        self._take = take
        self._begun: dict[socket.socket, bytes] = {}
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(os.fspath(path))
            path.chmod(0o600)
            self._listener.listen(128)
        except BaseException:
            self._listener.close()
            raise
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Listens no more."""
        for sock in [*self._begun]:
            self._forget(sock)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with suppress(OSError):  # none is left, or no descriptor
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            self._begun[sock] = b""
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._read(sock))

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, rest = (self._begun[sock] + data).split(b"\n")
        if not data or len(rest) > MOST_LINE:
            self._forget(sock)
        else:
            self._begun[sock] = rest
        for line in lines:
            self._take(line)

    def _forget(self, sock: socket.socket) -> None:
        del self._begun[sock]
        self._selector.unregister(sock)
        sock.close()
