"""What all connections of one gRPC port have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.status import StatusCode

#: Calls of one port at a time, streams among them; further ones are refused with RESOURCE_EXHAUSTED.
MAX_CALLS = 10_000
MAX_CONNECTIONS = 10_000
#: What all requests that are being received may have together.
MAX_RECEIVED = 128 * 1024 * 1024


class PortConnection(Protocol):
    """What a port asks of its connections."""

    def leave(self) -> None:
        """Takes no further call; ends with the last one that it has."""

    def end_calls(self) -> None:
        """Ends all calls and itself."""


class Port:
    """One port.

    Args:
        most_age_s: after so long a connection takes no further calls; None for no end.
        age_grace_s: the calls that it has then may take so long; None for no end.

    Attributes:
        methods: by their paths.
        most_calls: under way at a time.
        received: bytes of requests that are not complete.
        calls_under_way: their number.
        connections: those that are open.
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
        self.connections: set[PortConnection] = set()
        self._has_left = asyncio.Event()

    def admit(self) -> None:
        """Lets one more call begin.

        Raises:
            Failure: too many are under way.
        """
        if self.calls_under_way >= self.most_calls:
            raise Failure(StatusCode.RESOURCE_EXHAUSTED, f"More than {self.most_calls} calls are under way.")

    def welcome(self, connection: PortConnection) -> bool:
        """Takes a connection in; returns whether there is room for it."""
        if len(self.connections) >= MAX_CONNECTIONS:
            return False
        self.connections.add(connection)
        return True

    def left(self, connection: PortConnection) -> None:
        """Forgets a connection that is over."""
        self.connections.discard(connection)
        self._has_left.set()

    async def wait_until_empty(self) -> None:
        """Waits for the end of the last connection."""
        while self.connections:
            self._has_left.clear()
            await self._has_left.wait()
