"""The connections of a web worker: who is there, when each is looked at again, and what all of them hold together."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.dataplane.exchange import Exchange, RequestIds
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.tracing.records import QUEUED, RUNNING
from wsgi_ts.web.connection import Connection, SlotBody

READ_EVENTS: Final = select.EPOLLIN | select.EPOLLRDHUP
#: What all bodies that are received into the process's memory, and requests sent ahead, may have together.
MAX_RECEIVED: Final = 128 * 1024 * 1024
#: What all streamed answers may have unsent together; the one with the slowest reader ends then.
MAX_UNSENT: Final = 128 * 1024 * 1024
#: Limits of single answers are looked at no more often than this.
SHORTEST_TICK_NS: Final = 10_000_000


class ConnectionTable:
    """The table, and everything that takes a connection or its request out of it.

    Attributes:
        epoll: tells of their sockets.
        connections: by their descriptors.
        ready: those whose answer is sent and whose next request has already arrived.
        unread: those of which TLS has decrypted more than was received: epoll does not tell of them.
        received, unsent: who holds how many bytes of incomplete requests, and of streamed answers.
        receiving: slots that bodies are being received into.
        ids: where ids of requests come from.
        now_ns: monotonic time at which the turn of the loop has begun.
        look_at_ns: when the limits of connections are to be looked at next.
        left: told of a connection whose client has gone before it had its answer.
        has_closed: a connection was closed since this was last set to False.
    """

    def __init__(self, exchange: Exchange[Connection] | None, most_body_bytes: int) -> None:
        self.epoll = select.epoll()
        self.connections: dict[int, Connection] = {}
        self.ready: list[Connection] = []
        self.unread: list[Connection] = []
        self.received: Ledger[Connection] = Ledger(max(MAX_RECEIVED, 2 * most_body_bytes))
        self.unsent: Ledger[Connection] = Ledger(MAX_UNSENT)
        self.receiving = 0
        self.now_ns = time.monotonic_ns()
        self.look_at_ns = 0
        self.has_closed = False
        self.left: Callable[[Connection], None] = lambda connection: None
        self._exchange = exchange
        self.ids = RequestIds()

    @property
    def exchange(self) -> Exchange[Connection]:
        """The requests under way.

        Raises:
            RuntimeError: no predictions are served here.
        """
        if self._exchange is None:
            raise RuntimeError("a prediction in a process without an exchange")
        return self._exchange

    def add(self, connection: Connection, limit_s: float) -> None:
        """Takes a new connection in, whose first request must come within so many seconds."""
        connection.limit_at = time.monotonic() + limit_s
        connection.events = READ_EVENTS
        self.connections[connection.fd] = connection
        self.epoll.register(connection.fd, READ_EVENTS)

    def watch(self, connection: Connection, events: int) -> None:
        """Waits for other events of a connection from now on."""
        if connection.events != events:
            connection.events = events
            self.epoll.modify(connection.fd, events)

    def name_request(self, connection: Connection) -> None:
        """Gives the request under way an id and a time of arrival, if it has none."""
        connection.request_id = connection.request_id or self.ids.new()
        connection.arrival_ns = connection.arrival_ns or self.now_ns

    def limit_answer(self, connection: Connection, limit_ns: int) -> None:
        """Sets when the answer is due (monotonic ns); the loop looks then, and not only at its next tick."""
        connection.limit_at = limit_ns / 1e9
        self.look_at_ns = min(self.look_at_ns, max(limit_ns, self.now_ns + SHORTEST_TICK_NS))

    def client_gone(self, connection: Connection) -> None:
        """Closes a connection whose client has gone, or counts as gone."""
        target = connection.target
        if self._is_submitted(connection) and target is not None:
            self._note_state(connection)
            self.exchange.client_left(connection.slot, target, connection.request_id)
            connection.slot = -1
            self.left(connection)
        self.close(connection)

    def forget_slot(self, connection: Connection) -> None:
        """Abandons a submitted request: what has not begun never runs, and the slot is freed at its end."""
        if self._is_submitted(connection):
            self._note_state(connection)
            self.exchange.forget(connection.slot)
            connection.slot = -1

    def _note_state(self, connection: Connection) -> None:
        """Notes for its trace how far a request has come that nobody waits for any more."""
        client, slot = self.exchange.client, connection.slot
        if slot < client.capacity:  # else a workflow's
            connection.left_in = QUEUED if client.state(slot) < SlotState.RUNNING else RUNNING

    def _is_submitted(self, connection: Connection) -> bool:
        slot = connection.slot
        return slot >= 0 and self.exchange.waiting.get(slot) is connection

    def close(self, connection: Connection) -> None:
        """Takes a connection out of the table, with all that is held for it."""
        if connection.closed:
            return
        connection.closed = self.has_closed = True
        del self.connections[connection.fd]
        self.abandon_slot(connection)
        connection.out.clear()
        if self.received.total:
            self.received.note(connection, 0)
        if self.unsent.total:
            self.unsent.note(connection, 0)
        self.release_sent(connection)
        connection.sock.close()

    def abandon_slot(self, connection: Connection) -> None:
        """Gives back the slot of a request that will not be submitted any more."""
        slot = connection.slot
        if slot >= 0 and slot not in self.exchange.waiting:
            self.end_receiving(connection)
            connection.slot = -1
            self.exchange.client.abandon(slot)

    def end_receiving(self, connection: Connection) -> None:
        """Notes that nothing more is received into a slot."""
        if type(connection.body) is SlotBody:
            connection.body = None
            self.receiving -= 1

    def release_sent(self, connection: Connection) -> None:
        """Gives back the slot that an answer was sent from."""
        if connection.release_slot >= 0:
            self.exchange.client.release(connection.release_slot)
            connection.release_slot = -1
