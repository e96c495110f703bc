"""The connections of a web worker: who is there, what each waits for, and what all of them hold together."""

from __future__ import annotations

import logging
import select

from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.plane import DataPlane
from wsgi_ts.web.connection import Connection

log = logging.getLogger(__name__)

READ_EVENTS = select.EPOLLIN | select.EPOLLRDHUP
#: What all bodies that are received into the process's memory, and requests sent ahead, may have together.
MAX_RECEIVED = 128 * 1024 * 1024
#: What all streamed answers may have unsent together; the one with the slowest reader ends then.
MAX_UNSENT = 128 * 1024 * 1024


class ConnectionTable:
    """The table, and everything that takes a connection or its request out of it.

    Args:
        plane: the data plane; None where no predictions are served.
        most_body_bytes: the largest body of a request.
    """

    def __init__(self, plane: DataPlane | None, most_body_bytes: int) -> None:
        self._plane = plane
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._waiting: dict[int, Connection | None] = {}  # slot -> who waits; None: the client has gone
        self._streams: set[int] = set()
        #: Connections whose answer is sent and whose next request has already arrived.
        self._ready: list[Connection] = []
        #: Connections of which TLS has decrypted more than was received: epoll does not tell of them.
        self._unread: list[Connection] = []
        self._received: Ledger[Connection] = Ledger(max(MAX_RECEIVED, 2 * most_body_bytes))
        self._unsent: Ledger[Connection] = Ledger(MAX_UNSENT)
        #: Slots that bodies are being received into. Slow clients must leave some for requests that are complete.
        self._receiving = 0
        self._most_receiving = plane.client.capacity // 2 if plane is not None else 0

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.events != events:
            connection.events = events
            self._epoll.modify(connection.fd, events)

    def _client_gone(self, connection: Connection) -> None:
        if self._forget_slot(connection) and connection.target is not None and connection.target.is_continuous:
            log.info("Connection to client got closed; Removing job: %s", connection.request_id)
        self._close(connection)

    def _forget_slot(self, connection: Connection) -> bool:
        """Leaves a submitted request to itself: what has not begun is never run, and its slot is freed at its end.

        Returns:
            False when no request of this connection was under way.
        """
        slot = connection.slot
        if slot < 0 or self._waiting.get(slot) is not connection:
            return False
        connection.slot = -1
        self._waiting[slot] = None
        self._streams.discard(slot)
        self._plane.client.cancel(slot)  # type: ignore[union-attr]
        return True

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        connection.closed = True
        del self._connections[connection.fd]
        self._abandon_slot(connection)
        connection.out.clear()
        self._forget_bytes(connection)
        self._release_sent(connection)
        connection.sock.close()

    def _abandon_slot(self, connection: Connection) -> None:
        """Gives back the slot of a request that will not be submitted any more."""
        slot = connection.slot
        if slot >= 0 and slot not in self._waiting:
            self._end_receiving(connection)
            connection.slot = -1
            self._plane.client.abandon(slot)  # type: ignore[union-attr]

    def _end_receiving(self, connection: Connection) -> None:
        """Notes that nothing more is received into a slot."""
        if connection.body_room is not None:
            connection.body_room = None
            self._receiving -= 1

    def _release_sent(self, connection: Connection) -> None:
        """Gives back the slot that an answer was sent from."""
        if connection.release_slot >= 0:
            self._plane.client.release(connection.release_slot)  # type: ignore[union-attr]
            connection.release_slot = -1

    def _forget_bytes(self, connection: Connection) -> None:
        """Notes that nothing is held for a connection any more."""
        if self._received.total:
            self._received.note(connection, 0)
        if self._unsent.total:
            self._unsent.note(connection, 0)
