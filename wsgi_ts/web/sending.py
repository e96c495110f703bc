"""From what is queued for a connection to bytes on the wire; nobody gets more than a turn's share, nothing blocks."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Final

from wsgi_ts.web.connection import TURN_BYTES, Connection, Phase
from wsgi_ts.web.table import READ_EVENTS, ConnectionTable

#: Longer than nginx's 60 s for idle upstream connections, so that nginx is the one to close.
IDLE_LIMIT_S: Final = 75.0
SEND_LIMIT_S: Final = 60.0
LINGER_LIMIT_S: Final = 2.0
#: What a streamed answer may have unsent before its reader counts as gone.
MAX_UNSENT_STREAM: Final = 16 * 1024 * 1024
#: What a client may send behind a request while that is being answered (pipelining).
MAX_AHEAD: Final = 65536


class Sender:
    """Sends answers, and then has their connections wait for the next request, or end."""

    def __init__(self, table: ConnectionTable) -> None:
        self._table = table

    def send(self, connection: Connection, data: bytes = b"") -> None:
        """Sends what is queued and `data`; when all is gone, the connection is ready for its next request."""
        try:
            sent = send_now(connection, data) if data else send_queued(connection)
        except OSError:
            self._table.client_gone(connection)
            return
        if sent:
            self._sent(connection)
        else:
            connection.phase = Phase.SEND
            connection.limit_at = time.monotonic() + SEND_LIMIT_S
            self._table.watch(connection, select.EPOLLOUT)

    def _sent(self, connection: Connection) -> None:
        table = self._table
        if connection.release_slot >= 0:
            table.release_sent(connection)
        if table.received.total:
            table.received.note(connection, 0)
        if connection.close_after:
            self.linger(connection)
            return
        connection.answered_ns = table.now_ns
        connection.next_request()
        connection.limit_at = table.now_ns / 1e9 + IDLE_LIMIT_S
        if connection.events != READ_EVENTS:
            table.watch(connection, READ_EVENTS)
        if connection.buffer:
            table.ready.append(connection)

    def continue_sending(self, connection: Connection) -> None:
        """Goes on where the socket takes bytes again.

        Raises:
            OSError: the client has gone.
        """
        if connection.phase != Phase.STREAM:
            self.send(connection)
        elif send_queued(connection):
            self._table.watch(connection, events_ahead(connection))
        self.note_unsent(connection)

    def note_unsent(self, connection: Connection) -> None:
        """Updates the count of unsent bytes of a slow reader."""
        if connection in self._table.unsent:
            self._table.unsent.note(connection, connection.unsent)

    def linger(self, connection: Connection) -> None:
        """Closes so that the answer arrives: closing with unread bytes would make the kernel send RST instead."""
        if connection.half_closed:
            self._table.close(connection)
            return
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        connection.phase = Phase.LINGER
        connection.limit_at = time.monotonic() + LINGER_LIMIT_S
        self._table.watch(connection, READ_EVENTS)

    def flush(self, connection: Connection) -> None:
        """Sends what is queued of an answer that goes on."""
        try:
            is_sent = send_queued(connection)
        except OSError:
            self._table.client_gone(connection)
            return
        if is_sent:
            self.note_unsent(connection)
        else:
            self._table.watch(connection, select.EPOLLOUT)
            self.limit_unsent(connection)

    def limit_unsent(self, connection: Connection) -> None:
        """Ends the stream of a client that reads too slowly, and the slowest ones while all have too much unsent."""
        table = self._table
        if connection.unsent > MAX_UNSENT_STREAM:
            table.client_gone(connection)
            return
        table.unsent.note(connection, connection.unsent)
        while table.unsent.is_exceeded:
            table.client_gone(table.unsent.largest())


def events_ahead(connection: Connection) -> int:
    """Returns what to wait for while a request is under way: the client leaves, or sends ahead as much as it may."""
    return 0 if connection.half_closed or len(connection.buffer) > MAX_AHEAD else READ_EVENTS


def send_now(connection: Connection, data: bytes) -> bool:
    """Sends a small answer; returns whether all of it went at once. The rest is queued.

    Raises:
        OSError: the client has gone.
    """
    if connection.out:
        connection.queue(data)
        return False
    try:
        sent = connection.sock.send(data)
    except BlockingIOError:
        sent = 0
    if sent == len(data):
        return True
    connection.queue(memoryview(data)[sent:])
    return False


def send_queued(connection: Connection) -> bool:
    """Sends what the socket takes in one turn; returns whether nothing is left.

    Raises:
        OSError: the client has gone.
    """
    out, sock = connection.out, connection.sock
    room = TURN_BYTES
    while out:
        if room <= 0:
            return False
        parts = connection.next_parts()
        try:
            sent = sock.sendmsg(parts) if len(parts) > 1 else sock.send(parts[0])
        except BlockingIOError:
            return False
        connection.note_sent(sent)
        room -= sent
    return True
