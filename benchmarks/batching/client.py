"""Load for batching: clients that wait for their answer (closed loop), or requests at random times (open loop).

    python benchmarks/batching/client.py HOST PORT PATH clients N SECONDS      N clients, no thinking time
    python benchmarks/batching/client.py HOST PORT PATH rate PER_SECOND SECONDS

An open loop's latencies count from the moment for which a request was meant, not from when it could be sent: a
generator that runs late, or has to open a connection first, does not hide what users would have waited for. Its
connections are kept, and the one that has been idle longest is used first. One line of JSON on stdout.
"""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import time
from collections import deque

WARM_UP_S = 1.0
#: Connections of an open loop to begin with; more are opened when all are in use.
KEPT = 64
_ANSWER_LIMIT_S = 30.0


class Client:
    """The connections, and the latencies of what came back over them.

    Args:
        host: of the server.
        port: of the server.
        path: of the prediction.
        connections: how many to open at once.
    """

    def __init__(self, host: str, port: int, path: str, connections: int) -> None:
        self._address = (host, port)
        self._request = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\n\r\nabcd".encode()
        self._epoll = select.epoll()
        self._connections: dict[int, socket.socket] = {}
        self._meant_at: dict[int, float] = {}  # by descriptor, of what is under way
        self.idle: deque[int] = deque()
        self.latencies_s: list[float] = []
        self.failed = 0
        for _ in range(connections):
            self._open()

    def _open(self) -> None:
        connection = socket.create_connection(self._address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        self.idle.append(connection.fileno())

    def send(self, meant_at: float) -> None:
        """Sends a request that was meant for `meant_at` (monotonic seconds)."""
        if not self.idle:
            self._open()
        fd = self.idle.popleft()
        self._meant_at[fd] = meant_at
        self._connections[fd].send(self._request)

    def receive(self, limit_s: float) -> int:
        """Takes the answers that come within `limit_s`, at least what is there; returns how many that were."""
        events = self._epoll.poll(max(0.0, limit_s))
        now = time.monotonic()
        for fd, _ in events:
            answer = self._connections[fd].recv(65536)
            if not answer:  # the server has closed it, with or without a request under way
                self._connections.pop(fd).close()
                self.idle = deque(each for each in self.idle if each != fd)
                self.failed += self._meant_at.pop(fd, None) is not None
                continue
            if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(b"ok"):
                self.failed += 1
            self.latencies_s.append(now - self._meant_at.pop(fd))
            self.idle.append(fd)
        return len(events)

    @property
    def under_way(self) -> int:
        """How many requests have no answer yet."""
        return len(self._meant_at)


def closed_loop(client: Client, until: float) -> None:
    """Each connection sends its next request as soon as it has its answer."""
    while time.monotonic() < until:
        now = time.monotonic()
        for _ in range(len(client.idle)):
            client.send(now)
        client.receive(_ANSWER_LIMIT_S)


def open_loop(client: Client, rate: float, until: float) -> None:
    """Sends at random times, `rate` a second on average."""
    gaps = random.Random(1)
    following = time.monotonic()
    while following < until:
        now = time.monotonic()
        while following <= now:
            client.send(following)
            following += gaps.expovariate(rate)
        # epoll counts in milliseconds: shorter waits look again and again.
        wait = following - now
        client.receive(wait - 0.0005 if wait > 0.0015 else 0.0)


def measure(host: str, port: int, path: str, kind: str, amount: float, seconds: float) -> dict[str, float]:
    """The figures of one run, after a second that does not count."""
    client = Client(host, port, path, int(amount) if kind == "clients" else KEPT)
    for length in (WARM_UP_S, seconds):
        client.latencies_s, client.failed = [], 0
        begun = time.monotonic()
        if kind == "clients":
            closed_loop(client, begun + length)
        else:
            open_loop(client, amount, begun + length)
        took = time.monotonic() - begun
        answered = len(client.latencies_s)
        while client.under_way and client.receive(_ANSWER_LIMIT_S):
            pass
    latencies = sorted(client.latencies_s)
    return {
        "per_second": answered / took,
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[len(latencies) * 99 // 100] * 1e3,
        "failed": client.failed + client.under_way,
    }


if __name__ == "__main__":
    where, number, what, which, how_many, how_long = sys.argv[1:]
    print(json.dumps(measure(where, int(number), what, which, float(how_many), float(how_long))))
