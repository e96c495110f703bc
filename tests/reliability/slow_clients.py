"""Clients that send a byte a second: what `make prove` measures of those beside them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How many there are, and how often each sends a byte, in seconds.
SLOW_CLIENTS = 200
BYTE_S = 1.0
#: How many bytes a body has that comes slowly.
_BODY_BYTES = 1000


@contextmanager
def slow_clients(port: int, path: str) -> Iterator[None]:
    """Half of them are in the head of a request, half in its body. Whoever is let go comes again."""
    stop = threading.Event()
    thread = threading.Thread(target=_send_slowly, args=(port, path, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _SlowClient:
    """One connection after the other, of a request that comes byte by byte; it begins with its first `begun` bytes."""

    def __init__(self, port: int, request: bytes, begun: int) -> None:
        self._port, self._request, self._begun = port, request, begun
        self._sock: socket.socket | None = None
        self._sent = 0

    def send_byte(self) -> None:
        if self._sock is None or self._sent >= len(self._request):
            self.close()
            self._sock = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            self._sock.sendall(self._request[: self._begun])
            self._sent = self._begun
        self._sock.sendall(self._request[self._sent : self._sent + 1])
        self._sent += 1

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _send_slowly(port: int, path: str, stop: threading.Event) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n".encode()
    head += b"Content-Length: %d\r\n\r\n" % _BODY_BYTES
    request = head + b"x" * (_BODY_BYTES - 1)
    clients = [_SlowClient(port, request, number % 2 * len(head)) for number in range(SLOW_CLIENTS)]
    while not stop.is_set():
        turn_ends = time.monotonic() + BYTE_S
        for each in clients:
            try:
                each.send_byte()
            except OSError:  # it was let go
                each.close()
        stop.wait(max(0.0, turn_ends - time.monotonic()))
    for each in clients:
        each.close()
