"""Phase 1 of a request in a web worker: from bytes to a submitted slot.

The head is parsed, the model found, and the body received where it belongs: a large one straight into the slot. What is
no prediction is handed to the app when its body is complete, in a thread of the pool where it may block.
"""

from __future__ import annotations

import io
import logging
import os
import select
import socket
import ssl
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from wsgi_ts.batcher.layout import TOO_LATE
from wsgi_ts.batcher.shared_memory import SharedMemoryFull
from wsgi_ts.connection import DIRECT_BODY_BYTES, MAX_AHEAD, RECEIVE_BYTES, Connection, Phase
from wsgi_ts.dataplane import DataPlane, Target, Ticket
from wsgi_ts.errors import OutOfResources, RequestTimeout, ServiceUnavailable
from wsgi_ts.form_field import is_form
from wsgi_ts.gate import Gate
from wsgi_ts.http_request import BadHead, ChunkedBody, Head, check_partial_head, parse_head
from wsgi_ts.tls import TlsSocket
from wsgi_ts.web_answers import READ_EVENTS, AnswerSide, AppResponse, WSGIApp, call_app

if TYPE_CHECKING:
    from wsgi_ts.rest.apps import WebSettings

log = logging.getLogger(__name__)

HEAD_LIMIT_S = 10.0
BODY_LIMIT_S = 60.0
#: What must come of a body within that time for the next as much: 100 bytes a second.
LEAST_BODY_BYTES = 6000
POOL_THREADS = 8
#: Answers' own limits are looked at no more often than this.
SHORTEST_TICK_NS = 10_000_000
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LINE_ENDS = b"\r\n"


class RequestSide(AnswerSide):
    """The first half of every request.

    Args:
        settings, apps, sockets, plane, contexts: see `AnswerSide`.
        kinds: for each listening socket, the APIs that are served on it.
    """

    def __init__(
        self,
        settings: WebSettings,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
        kinds: list[tuple[str, ...]],
    ) -> None:
        super().__init__(settings, apps, sockets, plane, contexts)
        config, run_dir = settings.config, settings.run_dir
        # A management call may wait for workers to load.
        self._blocking = [each != ("inference",) for each in kinds]
        self._gates = [
            Gate(each, config, run_dir, self._board) if Gate.needed(each, config) else None for each in kinds
        ]
        self._pool: ThreadPoolExecutor | None = None
        self._finished_calls: deque[tuple[Connection, AppResponse]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
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
            if len(connection.buffer) > MAX_AHEAD:
                self._watch(connection, connection.events & ~select.EPOLLIN)

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
            slot, connection.slot = connection.slot, -1
            self._waiting[slot] = None
            self._plane.client.cancel(slot)  # type: ignore[union-attr]
            self._answer_now(connection, Ticket(RequestTimeout(TOO_LATE)))
        elif connection.phase in (Phase.ANSWER, Phase.STREAM):
            connection.limit_at = 0.0
        else:
            self._client_gone(connection)

    def _read_requests(self, connection: Connection) -> None:
        """Reads as many requests as can be answered now (one at a time: pipelined answers keep their order)."""
        while connection.buffer and connection.phase == Phase.HEAD and connection.fd in self._connections:
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
            self._begin(connection, head)

    def _check_partial_head(self, connection: Connection, buffer: bytes) -> None:
        try:
            check_partial_head(buffer)
        except BadHead as bad:
            self._refuse(connection, bad)
            return
        connection.limit_at = min(connection.limit_at, time.monotonic() + HEAD_LIMIT_S)

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
            self._begin_plain(connection, head)
        elif target.error is not None:
            if target.reads_form and is_form(head.content_type):
                self._begin_plain(connection, head)
            else:
                self._answer_now(connection, Ticket(target.error))
        else:
            self._begin_prediction(connection, head, target)

    def _begin_prediction(self, connection: Connection, head: Head, target: Target) -> None:
        client = self._plane.client  # type: ignore[union-attr]
        slot = client.take()
        if slot is None:
            self._answer_now(connection, Ticket(ServiceUnavailable.no_worker(target.model_name, target.version)))
            return
        connection.slot = slot
        length = head.content_length
        buffer = connection.buffer
        if head.chunked:
            self._expect_body(connection, head)
            connection.chunked = ChunkedBody(head, self._limit)
            self._more_body(connection, b"", first=buffer)
        elif length <= len(buffer):
            connection.buffer = buffer[length:]
            self._submit(connection, buffer[:length], length)
        elif length > DIRECT_BODY_BYTES:
            try:
                room = client.body_room(slot, length)
            except SharedMemoryFull as full:
                self._no_memory(connection, full)
                return
            room[: len(buffer)] = buffer
            connection.buffer = b""
            connection.body_room = room
            connection.body_have = len(buffer)
            self._expect_body(connection, head)
            self._receive_direct(connection)
        else:
            connection.body = bytearray(buffer)
            connection.buffer = b""
            self._expect_body(connection, head)

    def _expect_body(self, connection: Connection, head: Head) -> None:
        connection.phase = Phase.BODY
        connection.limit_at = time.monotonic() + BODY_LIMIT_S
        connection.body_seen = 0
        if head.expect_continue:
            connection.sock.send(_CONTINUE)

    def _receive_direct(self, connection: Connection) -> None:
        """Receives body bytes straight into the slot: exactly the missing ones, so the next request's stay queued."""
        room = connection.body_room
        if room is None:
            return
        while connection.body_have < len(room):
            try:
                count = connection.sock.recv_into(room[connection.body_have :])
            except BlockingIOError:
                return
            if not count:
                self._end_of_stream(connection)
                return
            connection.body_have += count
        connection.body_room = None
        if isinstance(connection.sock, TlsSocket):
            connection.buffer = connection.sock.take_pending()
        self._submit(connection, None, len(room))

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

    def _body_complete(self, connection: Connection, body: bytes) -> None:
        if connection.slot >= 0:
            self._submit(connection, body, len(body))
        else:
            self._call_app(connection, body)

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

    def _begin_plain(self, connection: Connection, head: Head) -> None:
        buffer = connection.buffer
        if head.chunked:
            self._expect_body(connection, head)
            connection.chunked = ChunkedBody(head, self._limit)
            self._more_body(connection, b"", first=buffer)
        elif head.content_length <= len(buffer):
            connection.buffer = buffer[head.content_length :]
            self._call_app(connection, buffer[: head.content_length])
        else:
            connection.body = bytearray(buffer)
            connection.buffer = b""
            self._expect_body(connection, head)

    def _begin_form_prediction(self, connection: Connection, head: Head, body: bytes) -> None:
        """Goes on with a prediction whose model stood in its form."""
        plane = self._plane
        if plane is None:
            raise RuntimeError("a prediction without a data plane")
        target = connection.target = plane.routes.form_target(head.content_type, body)
        slot = plane.client.take() if target.error is None else None
        if slot is None:
            error = target.error or ServiceUnavailable.no_worker(target.model_name, target.version)
            self._answer_now(connection, Ticket(error))
            return
        connection.slot = slot
        self._submit(connection, body, len(body))

    def _call_app(self, connection: Connection, body: bytes) -> None:
        if connection.target is not None and connection.head is not None:
            self._begin_form_prediction(connection, connection.head, body)
            return
        environ = self._environ(connection)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["wsgi_ts.plane"] = self._plane
        if connection.head is not None:
            environ["wsgi_ts.head"] = connection.head.raw
        app = self._apps[connection.listener]
        if not self._blocking[connection.listener]:
            self._respond(connection, call_app(app, environ))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="management")
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        self._pool.submit(self._call_in_pool, connection, app, environ)

    def _call_in_pool(self, connection: Connection, app: WSGIApp, environ: dict[str, Any]) -> None:
        self._finished_calls.append((connection, call_app(app, environ)))
        os.eventfd_write(self._wake_fd, 1)
