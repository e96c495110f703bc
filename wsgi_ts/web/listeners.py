"""The listening sockets of a web worker: what is served on each, and accepting as long as there are descriptors.

Connections that are not accepted wait in the kernel, where the other web workers find them, too.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from wsgi_ts.plugins.auth import Gate
from wsgi_ts.rest.direct import DirectAnswers
from wsgi_ts.rest.plugin_endpoints import WSGIApp
from wsgi_ts.rest.tokens import ADMITTED_KEY
from wsgi_ts.security.access import Access
from wsgi_ts.web.gate import GatedAccess
from wsgi_ts.web.plugins import PluginEndpoint

log = logging.getLogger(__name__)

#: At most so many connections a turn, so that the web workers share a burst of them.
ACCEPTS_PER_TURN = 16
MAX_CONNECTIONS = 10000
#: Descriptors of a process that are no connections: shared memory, logs, the threads' connections to the supervisor.
_OTHER_DESCRIPTORS = 128
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SAY_EVERY_S = 60.0


class Endpoint:
    """A listening socket and what is served on it.

    Args:
        context: the TLS settings; None for plain HTTP.
        direct: writes the answers that need no call of the app; None: the app answers everything.

    Attributes:
        may_block: a call of the app may wait, for workers to load; predictions never do.
        access: refuses requests; None where everybody may ask.
        plugins: the endpoints of plugins by the first segment of their paths.
        gate: the plugins that say who may ask; None for none.
        environ: the WSGI variables that all requests have in common.
    """

    def __init__(
        self,
        sock: socket.socket,
        kinds: tuple[str, ...],
        app: WSGIApp,
        context: ssl.SSLContext | None = None,
        direct: DirectAnswers | None = None,
    ) -> None:
        self.sock = sock
        self.kinds = kinds
        self.app = app
        self.context = context
        self.direct = direct
        self.may_block = kinds != ("inference",)
        self.access: Access | GatedAccess | None = None
        self.plugins: dict[str, PluginEndpoint] = {}
        self.gate: Gate | None = None
        name = sock.getsockname()
        server, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else (str(name), "")
        self.environ: dict[str, Any] = {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http" if context is None else "https",
            "wsgi.input": io.BytesIO(b""),
            # Bodies are received before the app is called: a chunked one ends, too, though no length is given.
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "SCRIPT_NAME": "",
            "SERVER_NAME": server,
            "SERVER_PORT": port,
            ADMITTED_KEY: True,
        }


def most_connections() -> int:
    """Returns how many connections this process takes under its limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft - _OTHER_DESCRIPTORS, soft // 2))


class Listeners:
    """The listening sockets, watched by the loop's epoll but while nothing can be accepted.

    Attributes:
        by_fd: the endpoints by the descriptors of their sockets; none once they are closed.
        is_paused: nothing is accepted for the moment; `resume` ends that.
    """

    def __init__(self, endpoints: Iterable[Endpoint], epoll: select.epoll) -> None:
        self.by_fd = {endpoint.sock.fileno(): endpoint for endpoint in endpoints}
        self.is_paused = True
        self._epoll = epoll
        self._limit = most_connections()
        self._say_at = 0.0
        for endpoint in self.by_fd.values():
            endpoint.sock.setblocking(False)
        self.resume()

    def accept(self, endpoint: Endpoint, there: int) -> Iterator[tuple[socket.socket, str]]:
        """Accepts some connections, and yields each with its client's address as the access log has it.

        `there` is how many connections the process has already.
        """
        for _ in range(ACCEPTS_PER_TURN):
            if there >= self._limit:
                self._pause(f"{there} connections are open, which is the limit of this process")
                return
            try:
                sock, address = endpoint.sock.accept()
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
        """Accepts again: to be called when a connection was closed, and now and then."""
        if self.is_paused:
            self.is_paused = False
            for fd in self.by_fd:
                self._epoll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def close(self) -> None:
        """Closes the sockets for good: what waits in the kernel is refused."""
        self._unwatch()
        for endpoint in self.by_fd.values():
            endpoint.sock.close()
        self.by_fd.clear()

    def _pause(self, reason: str) -> None:
        self._unwatch()
        now = time.monotonic()
        if now >= self._say_at:
            self._say_at = now + _SAY_EVERY_S
            log.warning("New connections wait until others are closed: %s. Raise the limit of open files.", reason)

    def _unwatch(self) -> None:
        if not self.is_paused:
            self.is_paused = True
            for fd in self.by_fd:
                self._epoll.unregister(fd)
