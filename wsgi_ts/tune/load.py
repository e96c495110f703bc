"""The load generator: a process of its own that asks the server, as clients that wait or at random times.

    python -m wsgi_ts.tune.load

reads orders (`Order`) as lines of JSON and answers each with a line (`Tally`). An open loop's latencies count from the
moment for which a request was meant, not from when it could be sent: a generator that runs late, or has to open a
connection first, does not hide what users would have waited for. How late it is says `late_us`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import selectors
import signal
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools

from wsgi_ts.process import die_with_parent

#: `select` takes no descriptor from 1024 on; some are for others. It is used because it alone waits for microseconds.
MOST_CONNECTIONS = 900
#: Connections of an open loop to begin with; more are opened when all are in use.
KEPT = 64
#: What is under way at the end is waited for so long, in seconds.
_LAST_ANSWERS_S = 30.0
_SHOWN_CHARS = 120


@dataclass(frozen=True)
class Order:
    """What is to be asked, and how.

    Attributes:
        host: of the server; or `unix_path`.
        tls: it speaks TLS; its certificate is not looked at.
        requests: the requests' bytes, base64; asked in turn.
        clients: so many ask again as soon as they are answered; 0: requests come at random times instead.
        rate: so many of these come in a second, on average.
        warm_up_s: seconds that do not count.
        seconds: seconds that count.
        seed: of the random times.
    """

    requests: list[str]
    host: str = ""
    port: int = 0
    unix_path: str = ""
    tls: bool = False
    clients: int = 0
    rate: float = 0.0
    warm_up_s: float = 0.0
    seconds: float = 1.0
    seed: int = 1


@dataclass
class Tally:
    """What came back.

    Attributes:
        latencies_us: of the answers with status 200, in microseconds.
        statuses: how many answers of each status; 0: connections that were refused or lost.
        refusal: the first answer with another status, its beginning.
        sent: requests that were sent in the time that counts.
        took_s: the time that counts.
        late_us: how late requests of the open loop were sent, the 99th percentile.
        cpu: the part of a core that the generator used.
    """

    latencies_us: list[int] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    refusal: str = ""
    sent: int = 0
    took_s: float = 0.0
    late_us: int = 0
    cpu: float = 0.0


class _Connection(asyncio.Protocol):
    """A connection that is kept; at most one request is under way on it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._body: list[bytes] = []
        self.meant_at = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the next request that waits for a connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._run.is_free(self)

    def send(self, request: bytes, meant_at: float) -> None:
        """Sends a request."""
        assert self._transport is not None
        self.meant_at, self.busy = meant_at, True
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Reads an answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_body(self, body: bytes) -> None:
        """Keeps what may have to be shown."""
        if self._parser.get_status_code() != 200:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """An answer is there."""
        self.busy = False
        keeps = self._parser.should_keep_alive()
        body = b"".join(self._body)
        self._body = []
        self._run.answered(self, self._parser.get_status_code(), body)
        if keeps:
            self._parser = httptools.HttpResponseParser(self)
            self._run.is_free(self)
        else:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Counts what was under way."""
        self._run.lost(self)

    def close(self) -> None:
        """Closes it."""
        if self._transport is not None:
            self._transport.close()


class Run:
    """One order under way, on the running event loop."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._requests = [base64.b64decode(each) for each in order.requests]
        self._loop = asyncio.get_running_loop()
        self._gaps = random.Random(order.seed)
        self._asked = 0
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self._opening = 0
        self._waiting: deque[float] = deque()  # meant at
        self._late: list[float] = []
        self._done = asyncio.Event()
        self._counts_from = self._until = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tls: ssl.SSLContext | None = None
        if order.tls:
            # The server on this machine, whose certificate names it as its clients know it.
            self._tls = ssl.create_default_context()
            self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self.tally = Tally()

    async def carry_out(self) -> Tally:
        """Carries the order out."""
        order = self._order
        for _ in range(order.clients or KEPT):
            self._connect()
        while self._opening:
            await asyncio.sleep(0.001)
        begun = self._loop.time()
        self._counts_from = begun + order.warm_up_s
        self._until = self._counts_from + order.seconds
        cpu = time.process_time()
        if order.clients:
            for connection in list(self._idle):
                self.is_free(connection, at=begun)
        else:
            self._next = begun
            self._arrive()
        self._loop.call_at(self._until, self._done.set)
        await self._done.wait()
        took = self._loop.time() - begun
        self.tally.cpu = (time.process_time() - cpu) / took
        self.tally.took_s = self._loop.time() - self._counts_from
        limit = self._loop.time() + _LAST_ANSWERS_S
        while (self._waiting or any(each.busy for each in self._open)) and self._loop.time() < limit:
            await asyncio.sleep(0.005)
        for each in self._open:
            if each.busy:
                self._count(0, each.meant_at)
            each.close()
        if self._late:
            self.tally.late_us = int(sorted(self._late)[len(self._late) * 99 // 100] * 1e6)
        return self.tally

    def is_free(self, connection: _Connection, at: float | None = None) -> None:
        """A connection has nothing to do."""
        self._open.add(connection)
        now = self._loop.time() if at is None else at
        if self._order.clients:
            if connection in self._idle:
                self._idle.remove(connection)
            if not self._until:
                self._idle.append(connection)
            elif now < self._until:
                self._send(connection, now)
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def answered(self, connection: _Connection, status: int, body: bytes) -> None:
        """A request has its answer."""
        if status != 200 and not self.tally.refusal:
            self.tally.refusal = f"{status} {_shown(body)}"
        self._count(status, connection.meant_at)

    def lost(self, connection: _Connection) -> None:
        """A connection is closed, with or without a request under way."""
        if connection.busy:
            connection.busy = False
            self._count(0, connection.meant_at)
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._order.clients and self._loop.time() < self._until:
            self._connect()

    def _count(self, status: int, meant_at: float) -> None:
        if not self._counts_from <= meant_at < self._until:
            return
        self.tally.statuses[status] = self.tally.statuses.get(status, 0) + 1
        if status == 200:
            self.tally.latencies_us.append(int((self._loop.time() - meant_at) * 1e6))

    def _arrive(self) -> None:
        """Sends the requests whose time has come."""
        now = self._loop.time()
        while self._next <= now and self._next < self._until:
            self._late.append(now - self._next)
            if self._idle:
                # The one that has been idle longest: users do not come back to the connection that is warm.
                self._send(self._idle.popleft(), self._next)
            else:
                self._waiting.append(self._next)
                if len(self._open) + self._opening < MOST_CONNECTIONS:
                    self._connect()
            self._next += self._gaps.expovariate(self._order.rate)
        if self._next < self._until:
            self._loop.call_at(self._next, self._arrive)

    def _send(self, connection: _Connection, meant_at: float) -> None:
        request = self._requests[self._asked % len(self._requests)]
        self._asked += 1
        self.tally.sent += self._counts_from <= meant_at
        connection.send(request, meant_at)

    def _connect(self) -> None:
        self._opening += 1
        task = self._loop.create_task(self._make_connection())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make_connection(self) -> None:
        order = self._order
        made: Callable[[], _Connection] = lambda: _Connection(self)  # noqa: E731
        try:
            if order.unix_path:
                await self._loop.create_unix_connection(made, order.unix_path, ssl=self._tls)
            else:
                await self._loop.create_connection(made, order.host, order.port, ssl=self._tls)
        except OSError as error:
            if not self.tally.refusal:
                self.tally.refusal = f"no connection: {error}"
            self.tally.statuses[0] = self.tally.statuses.get(0, 0) + 1
            if self._order.clients == 0 and self._waiting:
                self._waiting.popleft()
        finally:
            self._opening -= 1


def _shown(body: bytes) -> str:
    """What an error's answer says, on one line."""
    try:
        text = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        text = " ".join(body[: 4 * _SHOWN_CHARS].decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def main() -> None:
    """Carries out the orders on stdin until its end."""
    die_with_parent()
    # A Ctrl-C is for the command: this process ends with its stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    asyncio.set_event_loop(loop)

    async def carry_out(order: Order) -> Tally:
        return await Run(order).carry_out()

    try:
        for line in sys.stdin:
            tally = loop.run_until_complete(carry_out(Order(**json.loads(line))))
            print(json.dumps(asdict(tally)), flush=True)
    finally:
        loop.close()


if __name__ == "__main__":
    main()
