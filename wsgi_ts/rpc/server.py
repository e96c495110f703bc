"""The gRPC server of one port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from wsgi_ts.rpc.connection import RpcConnection
from wsgi_ts.rpc.port import Port

#: For the handshake of a TLS connection.
_HANDSHAKE_LIMIT_S = 8.0
_BACKLOG = 2048


class RpcServer:
    """Takes calls on a socket, and ends them."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Takes calls on a listening socket."""
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: RpcConnection(self.port),
            sock=sock,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else _HANDSHAKE_LIMIT_S,
            backlog=_BACKLOG,
        )

    async def stop(self, grace_s: float) -> None:
        """Takes no further calls; ends those under way after so many seconds. Call it again to hasten it."""
        port = self.port
        if self._listening is not None:
            self._listening.close()
        for connection in list(port.connections):
            connection.leave()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(port.wait_until_empty(), grace_s)
        for connection in list(port.connections):
            connection.end_calls()
        await port.wait_until_empty()
