"""The gRPC server of one port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterable

from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.connection import RpcConnection
from wsgi_ts.rpc.status import StatusCode

#: Calls of one port at a time, streams among them; further ones are refused with RESOURCE_EXHAUSTED.
MAX_CALLS = 10_000
MAX_CONNECTIONS = 10_000
#: What all requests that are being received may have together.
MAX_RECEIVED = 128 * 1024 * 1024
#: For the handshake of a TLS connection.
_HANDSHAKE_LIMIT_S = 8.0
_BACKLOG = 2048


class RpcServer:
    """One port.

    Args:
        methods: what is served.
        most_message_bytes: the largest request.
        most_age_s: after so long a connection takes no further calls; None for no end.
        age_grace_s: the calls that it has then may take so long; None for no end.

    Attributes:
        methods: by their paths.
        most_message_bytes, most_age_s, age_grace_s: as given.
        most_calls: under way at a time.
        received: bytes of requests that are not complete.
        calls_under_way: their number.
    """

    most_calls = MAX_CALLS

    def __init__(
        self,
        methods: Iterable[Method],
        most_message_bytes: int,
        most_age_s: float | None = None,
        age_grace_s: float | None = None,
    ) -> None:
        self.methods = {method.path: method for method in methods}
        self.most_message_bytes = most_message_bytes
        self.most_age_s = most_age_s
        self.age_grace_s = age_grace_s
        self.received: Ledger[RpcCall] = Ledger(max(MAX_RECEIVED, 2 * most_message_bytes))
        self.calls_under_way = 0
        self._connections: set[RpcConnection] = set()
        self._has_left = asyncio.Event()
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Takes calls on a listening socket.

        Args:
            sock: the socket.
            tls: what it is served with; None for plain text.
        """
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: RpcConnection(self),
            sock=sock,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else _HANDSHAKE_LIMIT_S,
            backlog=_BACKLOG,
        )

    async def stop(self, grace_s: float) -> None:
        """Takes no further calls; ends those under way after so many seconds. Call it again to hasten it."""
        if self._listening is not None:
            self._listening.close()
        for connection in list(self._connections):
            connection.leave()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wait_until_left(), grace_s)
        for connection in list(self._connections):
            connection.end_calls()
        await self._wait_until_left()

    async def _wait_until_left(self) -> None:
        while self._connections:
            self._has_left.clear()
            await self._has_left.wait()

    def admit(self) -> None:
        """Lets one more call begin.

        Raises:
            Failure: too many are under way.
        """
        if self.calls_under_way >= self.most_calls:
            raise Failure(StatusCode.RESOURCE_EXHAUSTED, f"More than {self.most_calls} calls are under way.")

    def welcome(self, connection: RpcConnection) -> bool:
        """Takes a connection in; returns whether there is room for it."""
        if len(self._connections) >= MAX_CONNECTIONS:
            return False
        self._connections.add(connection)
        return True

    def left(self, connection: RpcConnection) -> None:
        """Forgets a connection that is over."""
        self._connections.discard(connection)
        self._has_left.set()
