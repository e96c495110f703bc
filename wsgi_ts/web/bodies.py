"""The bodies of requests: a large one is received straight into its slot, all others into the process's memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.exchange import no_memory
from wsgi_ts.http.body import ChunkedBody, SizedBody
from wsgi_ts.http.head import BadHead, Head
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.answers import AS_SENT, Answers
from wsgi_ts.web.connection import TURN_BYTES, Connection, Phase, SlotBody
from wsgi_ts.web.table import ConnectionTable

BODY_LIMIT_S: Final = 60.0
#: What must come of a body within that time for the next as much: 100 bytes a second.
LEAST_BODY_BYTES: Final = 6000
#: A body above this is received straight into its slot.
DIRECT_BODY_BYTES: Final = 4096
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Bodies:
    """Receives bodies, and answers those that cannot be taken."""

    def __init__(self, table: ConnectionTable, answers: Answers, most_bytes: int) -> None:
        self._table = table
        self._answers = answers
        self._limit = most_bytes

    def goes_on(self, connection: Connection) -> bool:
        """Gives a body more time if enough of it has come since the last look; returns whether it has."""
        body = connection.body
        if body is None or body.received - connection.body_seen < LEAST_BODY_BYTES:
            return False
        connection.body_seen = body.received
        connection.limit_at = time.monotonic() + BODY_LIMIT_S
        return True

    # Straight into the slot

    def begin_direct(self, connection: Connection, head: Head) -> bool:
        """Has a body received straight into the slot; returns whether all of it is there.

        Raises:
            OSError: the client has gone.
        """
        buffer = connection.buffer
        body = SlotBody(head.content_length, len(buffer))
        if not self._give_room(connection, body):
            return False
        connection.body = body
        self._table.receiving += 1
        body.room[: len(buffer)] = buffer
        connection.buffer = b""
        self._expect(connection, head)
        return self.receive_direct(connection)

    def _give_room(self, connection: Connection, body: SlotBody) -> bool:
        """Reserves room in the slot for the next bytes of a body; False if /dev/shm is full, which is answered then."""
        client, slot = self._table.exchange.client, connection.slot
        try:
            body.room = client.body_room(slot, body.next_room(client.body_reserved(slot)))
        except SharedMemoryFull as full:
            self._table.abandon_slot(connection)
            self._answers.answer(connection, no_memory(full))
            return False
        return True

    def receive_direct(self, connection: Connection) -> bool:
        """Receives straight into the slot exactly the missing bytes, so that the next request's stay queued.

        Returns:
            Whether the body is complete.

        Raises:
            OSError: the client has gone.
        """
        body, sock = connection.body, connection.sock
        if type(body) is not SlotBody:
            return False
        stop_at = body.received + TURN_BYTES
        while body.received < body.length:
            if body.received >= stop_at:
                # TLS may have decrypted bytes already, which the next turn goes on with; of all others epoll tells.
                if isinstance(sock, TlsSocket) and sock.pending():
                    self._table.unread.append(connection)
                return False
            if body.received == len(body.room) and not self._give_room(connection, body):
                return False
            try:
                count = sock.recv_into(body.room[body.received : stop_at])
            except BlockingIOError:
                return False
            if not count:
                self._table.client_gone(connection)
                return False
            body.received += count
        self._table.end_receiving(connection)
        if isinstance(sock, TlsSocket):
            connection.buffer = sock.take_pending()
        return True

    # Into the process's memory

    def begin(self, connection: Connection, head: Head) -> bytes | None:
        """Has a body received into memory; returns it if all of it is there."""
        buffer = connection.buffer
        if not head.chunked and head.content_length <= len(buffer):
            connection.buffer = buffer[head.content_length :]
            return buffer[: head.content_length]
        connection.body = ChunkedBody(self._limit) if head.chunked else SizedBody(head.content_length)
        connection.buffer = b""
        self._expect(connection, head)
        return self.more(connection, buffer)

    def more(self, connection: Connection, data: bytes) -> bytes | None:
        """Takes what has come; returns the body if it is complete."""
        body = connection.body
        if body is None or isinstance(body, SlotBody):
            return None
        try:
            body.feed(data)
        except BadHead as bad:
            self._answers.refuse(connection, bad)
            return None
        if body.too_large:
            self._answers.too_large(connection)
        elif body.complete:
            connection.buffer = body.rest
            connection.body = None
            return bytes(body.data)
        else:
            self.hold(connection, len(body.data))
        return None

    def hold(self, connection: Connection, held: int, request: Mapping[str, str] = AS_SENT) -> None:
        """Counts the bytes of an incomplete request in memory; refuses it if all together hold too many."""
        self._table.received.note(connection, held)
        if self._table.received.is_exceeded:
            what = "Too many bytes of incomplete requests have been received. "
            self._answers.unavailable(connection, what, request)

    def _expect(self, connection: Connection, head: Head) -> None:
        connection.phase = Phase.BODY
        connection.limit_at = time.monotonic() + BODY_LIMIT_S
        connection.body_seen = 0
        if head.expect_continue:
            connection.sock.send(CONTINUE)
