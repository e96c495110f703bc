"""What Kubernetes does to a server that it stops: SIGTERM at once, and some time later nobody is sent there any more.

Clients behave as behind kube-proxy: they choose an address when they connect, and keep their connection. Works with any
HTTP server: `port`, `path` and how it is told to stop are all it knows.
"""

from __future__ import annotations

import http.client
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class OtherPod:
    """The server beside the one that is stopped: answers each POST with its body; a context manager."""

    def __enter__(self) -> int:
        """Starts it; returns its port."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the word that its head has come

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Service:
    """The addresses of a service, and clients that send it requests, one after the other, on connections they keep.

    Args:
        ports: the addresses.
        path: where a request is posted, which is answered with its own body.
        clients: how many.
        tls: what the servers are checked by; None: plain HTTP.

    Attributes:
        outcomes: how many requests ended how: "ok", or what went wrong.
        answered: how many each address has answered.
    """

    def __init__(self, ports: list[int], path: str, clients: int = 8, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._ports = list(ports)
        self._path = path
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.answered: Counter[int] = Counter()
        self._threads = [threading.Thread(target=self._client, args=(random.Random(seed),)) for seed in range(clients)]

    def __enter__(self) -> Service:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def remove(self, port: int) -> None:
        """Gives an address to no new connection."""
        self._ports = [each for each in self._ports if each != port]

    def end(self, port: int, stop: Callable[[], None], late_s: float) -> None:
        """Ends a server as Kubernetes does.

        Args:
            port: its address.
            stop: sends it SIGTERM.
            late_s: how much later new connections stop coming, in seconds.
        """
        stop()
        if late_s:
            time.sleep(late_s)
        self.remove(port)

    def _client(self, chance: random.Random) -> None:
        connection, port = self._connect(chance)
        while not self._stopping.is_set():
            body = chance.randbytes(16).hex().encode()
            try:
                connection.request("POST", self._path, body, {"content-type": "application/octet-stream"})
                reply = connection.getresponse()
                answer = reply.read()
                outcome = "ok" if (reply.status, answer) == (200, body) else f"{reply.status} {answer!r:.200}"
                closes = reply.will_close
            except (OSError, http.client.HTTPException) as error:
                outcome, closes = f"{type(error).__name__}: {error}", True
            with self._lock:
                self.outcomes[outcome] += 1
                self.answered[port] += 1
            if closes:
                connection.close()
                connection, port = self._connect(chance)
            # Some connections are used all the time, others rest between two requests.
            time.sleep(chance.choice((0.0, 0.002, 0.05)))
        connection.close()

    def _connect(self, chance: random.Random) -> tuple[http.client.HTTPConnection, int]:
        port = chance.choice(self._ports)
        if self._tls is not None:
            return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=self._tls), port
        return http.client.HTTPConnection("127.0.0.1", port, timeout=30), port
