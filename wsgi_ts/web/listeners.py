"""The listening sockets of a web worker: accepting as long as there are descriptors, and leaving it where not.

Connections that are not accepted wait in the kernel, where the other web workers find them, too.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import socket
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

#: At most so many connections a turn, so that the web workers share a burst of them.
ACCEPTS_PER_TURN = 16
MAX_CONNECTIONS = 10000
#: Descriptors of a process that are no connections: shared memory, logs, the threads' connections to the supervisor.
_OTHER_DESCRIPTORS = 128
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SAY_EVERY_S = 60.0


def most_connections() -> int:
    """How many connections this process takes under its limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft - _OTHER_DESCRIPTORS, soft // 2))


class Listeners:
    """The sockets, watched by the loop's epoll but while nothing can be accepted.

    Args:
        sockets: the listening sockets.
        epoll: the loop's.

    Attributes:
        sockets: as given.
        is_paused: nothing is accepted for the moment; `resume` ends that.
    """

    def __init__(self, sockets: list[socket.socket], epoll: select.epoll) -> None:
        self.sockets = sockets
        self.is_paused = True
        self._epoll = epoll
        self._numbers = {sock.fileno(): number for number, sock in enumerate(sockets)}
        self._limit = most_connections()
        self._say_at = 0.0
        for sock in sockets:
            sock.setblocking(False)
        self.resume()

    def number(self, fd: int) -> int | None:
        """Which of the sockets a descriptor belongs to; None for none."""
        return self._numbers.get(fd)

    def accept(self, number: int, there: int) -> Iterator[tuple[socket.socket, str]]:
        """Accepts some connections: each with its client's address as the access log has it.

        Args:
            number: of the listening socket.
            there: connections that the process has already.
        """
        for _ in range(ACCEPTS_PER_TURN):
            if there >= self._limit:
                self._pause(f"{there} connections are open, which is the limit of this process")
                return
            try:
                sock, address = self.sockets[number].accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._pause(f"a connection cannot be accepted: {os.strerror(error.errno)}")
                elif error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    log.warning("A connection cannot be accepted: %s", error)
                return
            there += 1
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock, f"/{address[0]}:{address[1]}" if isinstance(address, tuple) and address else "/unix"

    def resume(self) -> None:
        """Accepts again; to be called when a connection was closed, and now and then."""
        if self.is_paused:
            self.is_paused = False
            for sock in self.sockets:
                self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def close(self) -> None:
        """Closes the sockets for good; what waits in the kernel is refused."""
        self._unwatch()
        self._numbers.clear()
        for sock in self.sockets:
            sock.close()
        self.sockets = []

    def _pause(self, reason: str) -> None:
        self._unwatch()
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + _SAY_EVERY_S
            log.warning("New connections wait until others are closed: %s. Raise the limit of open files.", reason)

    def _unwatch(self) -> None:
        if not self.is_paused:
            self.is_paused = True
            for sock in self.sockets:
                self._epoll.unregister(sock.fileno())
