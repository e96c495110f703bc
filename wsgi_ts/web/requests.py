"""Phase 1 of a request in a web worker: from bytes to a submitted slot.

The head is parsed, the model found, and the body received where it belongs: a large one straight into the slot. What is
no prediction is handed to the app when its body is complete, in a thread of the pool where it may block.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import ssl
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wsgi_ts.batcher.shm.layout import TOO_LATE
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.plane import DataPlane, Target, Ticket
from wsgi_ts.errors import OutOfResources, RequestTimeout, ServiceUnavailable
from wsgi_ts.http.form_field import is_form
from wsgi_ts.http.head import BadHead, ChunkedBody, Head, check_partial_head, parse_head
from wsgi_ts.rest.management import may_wait
from wsgi_ts.security.access import Gate
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.answers import AS_SENT, NO_REQUEST, AnswerSide
from wsgi_ts.web.app import WSGIApp, call_app
from wsgi_ts.web.calls import CallThreads
from wsgi_ts.web.connection import DIRECT_BODY_BYTES, RECEIVE_BYTES, TURN_BYTES, Connection, Phase
from wsgi_ts.web.table import READ_EVENTS

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

HEAD_LIMIT_S = 10.0
BODY_LIMIT_S = 60.0
#: What must come of a body within that time for the next as much: 100 bytes a second.
LEAST_BODY_BYTES = 6000
#: Answers' own limits are looked at no more often than this.
SHORTEST_TICK_NS = 10_000_000
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
#: A beginning of a head up to this is not counted: a connection takes as much by itself.
_LEAST_COUNTED = 1024
_LINE_ENDS = b"\r\n"


class RequestSide(AnswerSide):
    """The first half of every request.

    Args:
        instance, apps, sockets, plane, contexts: see `AnswerSide`.
        kinds: for each listening socket, the APIs that are served on it.
    """

    def __init__(
        self,
        instance: Instance,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
        kinds: list[tuple[str, ...]],
    ) -> None:
        super().__init__(instance, apps, sockets, plane, contexts)
        config, run_dir = instance.config, instance.run_dir
        # A management call may wait for workers to load.
        self._blocking = [each != ("inference",) for each in kinds]
        self._gates = [
            Gate(each, config, run_dir, self._board) if Gate.needed(each, config) else None for each in kinds
        ]
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls = CallThreads(lambda: os.eventfd_write(self._wake_fd, 1))
        self._stopping = False
        self._next_tick = 0

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._end_of_stream(connection)
            return
        phase = connection.phase
        if phase == Phase.HEAD:
            connection.buffer = connection.buffer + data if connection.buffer else data
            self._read_requests(connection)
        elif phase == Phase.BODY:
            self._more_body(connection, data)
        elif phase == Phase.LINGER:
            connection.ignored += len(data)
            if connection.ignored > self._ignorable(connection):
                self._close(connection)
        else:
            connection.buffer += data
            self._received.note(connection, len(connection.buffer))
            # Where all together have sent too much ahead, this one sends no more until it is answered.
            self._watch(connection, 0 if self._received.is_exceeded else self._reading(connection))

    def _end_of_stream(self, connection: Connection) -> None:
        """The client has sent all it will. It may have closed, or only its sending half."""
        connection.half_closed = True
        if connection.phase in (Phase.HEAD, Phase.BODY, Phase.LINGER):
            self._client_gone(connection)
            return
        self._watch(connection, connection.events & ~READ_EVENTS)
        connection.close_after = True
        if connection.phase == Phase.ANSWER and connection.head is not None and connection.head.http_1_1:
            # An interim answer changes nothing for a client that still reads (RFC 9110 15.2), and makes the kernel of
            # one that has closed say so at once.
            connection.sock.send(_CONTINUE)

    def _give_up(self, connection: Connection) -> None:
        """A limit has passed: says so where the client is owed an answer, else just closes."""
        if connection.phase == Phase.BODY and connection.body_received - connection.body_seen >= LEAST_BODY_BYTES:
            connection.body_seen = connection.body_received
            connection.limit_at = time.monotonic() + BODY_LIMIT_S
            return
        started = connection.phase == Phase.HEAD and connection.buffer
        if started or connection.phase == Phase.BODY:
            self._refuse(connection, BadHead(408, "The request did not arrive in time."))
        elif connection.phase == Phase.ANSWER and connection.target is not None:
            # What has not begun will not be, since the slot is cancelled; what runs is answered to nobody.
            self._forget_slot(connection)
            self._answer_now(connection, Ticket(RequestTimeout(TOO_LATE)))
        elif connection.phase in (Phase.ANSWER, Phase.STREAM):
            connection.limit_at = 0.0
        else:
            self._client_gone(connection)

    def _read_requests(self, connection: Connection) -> None:
        """Reads as many requests as can be answered now (one at a time: pipelined answers keep their order)."""
        while connection.buffer and connection.phase == Phase.HEAD and not connection.closed:
            buffer = connection.buffer
            if buffer[0] in _LINE_ENDS:
                buffer = connection.buffer = buffer.lstrip(b"\r\n")
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._check_partial_head(connection, buffer)
                return
            end += 4
            try:
                head = parse_head(buffer[:end])
            except BadHead as bad:
                self._refuse(connection, bad)
                return
            connection.buffer = buffer[end:]
            if self._received.total:
                self._received.note(connection, 0)
            self._begin(connection, head)

    def _check_partial_head(self, connection: Connection, buffer: bytes) -> None:
        try:
            check_partial_head(buffer)
        except BadHead as bad:
            self._refuse(connection, bad)
            return
        connection.limit_at = min(connection.limit_at, time.monotonic() + HEAD_LIMIT_S)
        if len(buffer) > _LEAST_COUNTED:
            self._hold(connection, len(buffer), NO_REQUEST)

    def _hold(self, connection: Connection, held: int, request: Mapping[str, str] = AS_SENT) -> None:
        """Notes that so many bytes of a request that is not complete lie in memory; refuses it if that is too much."""
        self._received.note(connection, held)
        if self._received.is_exceeded:
            self._unavailable(connection, "Too many bytes of incomplete requests have been received. ", request)

    def _unavailable(self, connection: Connection, what: str, request: Mapping[str, str] = AS_SENT) -> None:
        """Answers a request that the server could take at another time, and ends the connection."""
        self._abandon_slot(connection)
        connection.close_after = True
        connection.request_id = connection.request_id or self._ids.new()
        connection.arrival_ns = connection.arrival_ns or self._now_ns
        error = ServiceUnavailable(what + "Please try again in a few seconds.")
        self._answer_error(connection, error, request)

    def _begin(self, connection: Connection, head: Head) -> None:
        connection.head = head
        connection.arrival_ns = self._now_ns
        connection.request_id = self._ids.new()
        connection.close_after = not head.keep_alive or connection.half_closed or self._stopping
        plane = self._plane
        if head.content_length > self._limit:
            self._too_large(connection)
            return
        gate = self._gates[connection.listener]
        if gate is not None and not gate.has_admitted(head):
            refusal = gate.refusal_of(head)
            if refusal is not None:
                self._answer_error(connection, refusal)
                return
        target = plane.routes.target_of(head) if plane is not None else None
        connection.target = target
        if target is None:
            self._begin_body(connection, head)
        elif target.error is not None:
            if target.reads_form and is_form(head.content_type):
                self._begin_body(connection, head)
            else:
                self._answer_now(connection, Ticket(target.error))
        else:
            self._begin_prediction(connection, head, target)

    def _begin_prediction(self, connection: Connection, head: Head, target: Target) -> None:
        length = head.content_length
        buffer = connection.buffer
        if not head.chunked and length <= len(buffer):
            if self._take_slot(connection, target):
                connection.buffer = buffer[length:]
                self._submit(connection, buffer[:length], length)
        elif head.chunked or length <= DIRECT_BODY_BYTES:
            self._begin_body(connection, head)
        elif self._receiving >= self._most_receiving:
            self._unavailable(connection, "Too many request bodies are being received. ")
        elif self._take_slot(connection, target):
            self._begin_direct(connection, head)

    def _take_slot(self, connection: Connection, target: Target) -> bool:
        """Takes a slot for a prediction; False where there is none for its model, which is answered."""
        slot = self._plane.client.take(target.model)  # type: ignore[union-attr]
        if slot is None:
            self._answer_now(connection, Ticket(ServiceUnavailable.no_slot(target.model_name, target.version)))
            return False
        connection.slot = slot
        return True

    def _begin_direct(self, connection: Connection, head: Head) -> None:
        """Has the body received straight into the slot."""
        buffer = connection.buffer
        connection.body = connection.chunked = None
        connection.body_have = len(buffer)
        try:
            room = self._body_room(connection)
        except SharedMemoryFull as full:
            self._no_memory(connection, full)
            return
        self._receiving += 1
        room[: len(buffer)] = buffer
        connection.buffer = b""
        self._expect_body(connection, head)
        self._receive_direct(connection)

    def _body_room(self, connection: Connection) -> memoryview:
        """Gives the connection room in its slot for what may come next of its body.

        Raises:
            SharedMemoryFull: /dev/shm is full.
        """
        client, slot = self._plane.client, connection.slot  # type: ignore[union-attr]
        room = connection.body_room = client.body_room(slot, connection.next_room(client.body_reserved(slot)))
        return room

    def _expect_body(self, connection: Connection, head: Head) -> None:
        connection.phase = Phase.BODY
        connection.limit_at = time.monotonic() + BODY_LIMIT_S
        connection.body_seen = 0
        if head.expect_continue:
            connection.sock.send(_CONTINUE)

    def _receive_direct(self, connection: Connection) -> None:
        """Receives body bytes straight into the slot: exactly the missing ones, so the next request's stay queued."""
        room, head = connection.body_room, connection.head
        if room is None or head is None:
            return
        stop_at = connection.body_have + TURN_BYTES
        while connection.body_have < head.content_length:
            if connection.body_have >= stop_at:
                self._note_unread(connection)
                return
            if connection.body_have == len(room):
                try:
                    room = self._body_room(connection)
                except SharedMemoryFull as full:
                    self._no_memory(connection, full)
                    return
            try:
                count = connection.sock.recv_into(room[connection.body_have : stop_at])
            except BlockingIOError:
                return
            if not count:
                self._end_of_stream(connection)
                return
            connection.body_have += count
        self._end_receiving(connection)
        if isinstance(connection.sock, TlsSocket):
            connection.buffer = connection.sock.take_pending()
        self._submit(connection, None, head.content_length)

    def _note_unread(self, connection: Connection) -> None:
        """Has the next turn go on where TLS has decrypted bytes already; of all others epoll tells."""
        if isinstance(connection.sock, TlsSocket) and connection.sock.pending():
            self._unread.append(connection)

    def _more_body(self, connection: Connection, data: bytes, first: bytes = b"") -> None:
        head = connection.head
        if head is None:
            return
        if connection.chunked is not None:
            connection.buffer = b""
            self._more_chunks(connection, connection.chunked, first or data)
            return
        body = connection.body
        if body is None:
            return
        missing = head.content_length - len(body)
        body += data[:missing]
        if len(body) == head.content_length:
            connection.buffer = data[missing:]
            self._body_complete(connection, bytes(body))
        else:
            self._hold(connection, len(body))

    def _more_chunks(self, connection: Connection, chunked: ChunkedBody, data: bytes) -> None:
        try:
            chunked.feed(data)
        except BadHead as bad:
            self._refuse(connection, bad)
            return
        if chunked.too_large:
            self._too_large(connection)
        elif chunked.complete:
            connection.buffer = chunked.rest
            self._body_complete(connection, bytes(chunked.data))
        else:
            self._hold(connection, len(chunked.data))

    def _body_complete(self, connection: Connection, body: bytes) -> None:
        """Goes on with a request whose body was received into the process's memory."""
        connection.body = connection.chunked = None
        target, head, plane = connection.target, connection.head, self._plane
        if target is None:
            self._call_app(connection, body)
            return
        if plane is None or head is None:
            raise RuntimeError("a prediction without a data plane")
        if target.reads_form:
            target = connection.target = plane.routes.form_target(head.content_type, body)
        if target.error is not None:
            self._answer_now(connection, Ticket(target.error))
        elif self._take_slot(connection, target):
            self._submit(connection, body, len(body))
            self._received.note(connection, 0)

    def _submit(self, connection: Connection, body: bytes | None, length: int) -> None:
        plane, target, head = self._plane, connection.target, connection.head
        if plane is None or target is None or head is None:
            raise RuntimeError("a request without target reached _submit")
        slot = connection.slot
        raw, sequence = head.raw, b""
        if target.has_sequences:
            sequence, raw = plane.sequence_of(raw)
        try:
            plane.client.submit(
                slot,
                target.model,
                target.batchers[0] if len(target.batchers) == 1 else plane.choose(target, sequence),
                connection.request_id.encode(),
                raw,
                target.url_path,
                head.content_type,
                body,
                length,
                target.flags,
                connection.arrival_ns,
                connection.idle_us,
                sequence,
            )
        except SharedMemoryFull as full:
            self._no_memory(connection, full)
            return
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        if target.client_timeout_ms:
            self._limit_answer(connection, connection.arrival_ns + target.client_timeout_ms * 1_000_000)
        self._waiting[slot] = connection
        if connection.half_closed:
            self._watch(connection, connection.events & ~READ_EVENTS)

    def _limit_answer(self, connection: Connection, limit_ns: int) -> None:
        """The answer must be there at this monotonic time; the loop looks then, and not only at its next tick."""
        connection.limit_at = limit_ns / 1e9
        self._next_tick = min(self._next_tick, max(limit_ns, self._now_ns + SHORTEST_TICK_NS))

    def _no_memory(self, connection: Connection, full: SharedMemoryFull) -> None:
        log.error("%s", full.strerror)
        self._abandon_slot(connection)
        self._answer_now(connection, Ticket(OutOfResources("Not enough shared memory for the request")))

    def _begin_body(self, connection: Connection, head: Head) -> None:
        """Has a body received into the process's memory; a slot is taken when it is complete, if it takes one."""
        buffer = connection.buffer
        if head.chunked:
            self._expect_body(connection, head)
            connection.chunked = ChunkedBody(head, self._limit)
            self._more_body(connection, b"", first=buffer)
        elif head.content_length <= len(buffer):
            connection.buffer = buffer[head.content_length :]
            self._body_complete(connection, buffer[: head.content_length])
        else:
            connection.body = bytearray(buffer)
            connection.buffer = b""
            self._expect_body(connection, head)

    def _call_app(self, connection: Connection, body: bytes) -> None:
        environ = self._environ(connection)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["wsgi_ts.plane"] = self._plane
        if connection.head is not None:
            environ["wsgi_ts.head"] = connection.head.raw
        app = self._apps[connection.listener]
        if not self._blocking[connection.listener]:
            self._respond(connection, call_app(app, environ))
            return
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        self._calls.submit(connection, app, environ, waits=may_wait(environ))
