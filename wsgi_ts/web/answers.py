"""Phase 2 of a request in a web worker: from a finished slot to bytes on the wire.

`AnswerSide` holds the table of connections and everything that ends a request: calling the app with the finished
ticket, sending, streaming, lingering, closing, the access log and the counters. `RequestSide` adds phase 1.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import SlotState, WebWord
from wsgi_ts.dataplane.plane import DataPlane, RequestIds, Ticket, ticket_of
from wsgi_ts.errors import InternalServerError, ServerError
from wsgi_ts.http.head import BadHead
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.rest.responses import BASE_HEADERS, ERROR_KEY, UNEXPECTED, encode_json
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.app import AppResponse, WSGIApp, base_environ, call_app
from wsgi_ts.web.connection import MAX_AHEAD, MAX_UNSENT_STREAM, Connection, Phase
from wsgi_ts.web.table import READ_EVENTS, ConnectionTable

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: Longer than nginx's 60 s for idle upstream connections, so that nginx is the one to close.
IDLE_LIMIT_S = 75.0
SEND_LIMIT_S = 60.0
LINGER_LIMIT_S = 2.0
LINGER_BYTES = 256 * 1024
#: With at most this many requests under way, and answers that take no longer than this, the loop looks for them
#: actively (see `WebLoop._spin`).
SPIN_IN_FLIGHT = 24
SPIN_LIMIT_NS = 1_000_000
_TOO_LARGE = b"HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"
#: Bodies up to this size are copied out of the slot and sent with the head; larger ones are sent from the slot.
_SMALL_BODY = 16384

AS_SENT: Mapping[str, str] = {}
#: What stands in for a request that could not be read.
NO_REQUEST = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "SERVER_PROTOCOL": "HTTP/1.1"}


class AnswerSide(ConnectionTable):
    """The second half of every request.

    Args:
        instance: the instance.
        apps: the WSGI app of each listening socket.
        sockets: the listening sockets.
        plane: the data plane; None where no predictions are served.
        contexts: the TLS settings of each listening socket, None where it speaks plain HTTP.
    """

    def __init__(
        self,
        instance: Instance,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
    ) -> None:
        super().__init__(plane, instance.config.max_request_size)
        self._instance = instance
        self._apps = apps
        self._limit = instance.config.max_request_size
        self._base_environs = [
            base_environ(sock, "http" if context is None else "https")
            for sock, context in zip(sockets, contexts, strict=True)
        ]
        self._access = AccessLog(instance.log_files.access)
        self._counts = [0, 0, 0]
        self._board = plane.board if plane is not None else Board.attach(instance.prefix)
        self._web_row = plane.web_row if plane is not None else self._board.control_web_row
        self._ids = RequestIds()
        self._now_ns = time.monotonic_ns()
        #: Smoothed time from a request to its answer while few are under way; what `_spin` goes by.
        self._quick_ns = SPIN_LIMIT_NS

    def _collect(self, plane: DataPlane) -> None:
        for slot in plane.client.answered():
            connection = self._waiting.get(slot)
            if connection is None:
                self._take_back(plane, slot)
                continue
            try:
                if slot in self._streams:
                    self._pump(connection, slot)
                else:
                    self._answer_slot(plane, connection, slot)
            except Exception:
                self._request_failed(connection)

    def _take_back(self, plane: DataPlane, slot: int) -> None:
        """Looks after a slot that nobody waits for any more: it is freed when its worker has ended the request."""
        client = plane.client
        if client.state(slot) == SlotState.STREAMING:
            client.read_stream(slot)
        else:
            self._waiting.pop(slot, None)
            client.release(slot)

    def _answer_slot(self, plane: DataPlane, connection: Connection, slot: int) -> None:
        client = plane.client
        answer = client.answer(slot)
        if client.in_flight <= SPIN_IN_FLIGHT:
            took_ns = min(time.monotonic_ns() - connection.arrival_ns, 2 * SPIN_LIMIT_NS)
            self._quick_ns += (took_ns - self._quick_ns) // 8
        target = connection.target
        if target is None:
            raise RuntimeError("an answered slot without target")
        if answer.streamed:
            ticket = Ticket()
            ticket.status, ticket.phrase, ticket.headers = answer.status, answer.phrase, answer.headers
            ticket.stream = iter(())
            response = self._app_response(connection, ticket)
            self._streams.add(slot)
            self._start_stream(connection, response)
            self._pump(connection, slot)
            return
        ticket = ticket_of(answer, target)
        del self._waiting[slot]
        connection.slot = -1
        if len(ticket.body) <= _SMALL_BODY:
            ticket.body = bytes(ticket.body)
            client.release(slot)
        else:
            client.keep_for_sending(slot)
            connection.release_slot = slot
        self._answer_now(connection, ticket)

    def _answer_now(self, connection: Connection, ticket: Ticket) -> None:
        self._respond(connection, self._app_response(connection, ticket))

    def _app_response(self, connection: Connection, ticket: Ticket) -> AppResponse:
        environ = self._environ(connection)
        environ["wsgi_ts.ticket"] = ticket
        return call_app(self._apps[connection.listener], environ)

    def _environ(self, connection: Connection) -> dict[str, Any]:
        environ = self._base_environs[connection.listener].copy()
        if connection.head is not None:
            environ.update(connection.head.environ)
        environ["wsgi_ts.request_id"] = connection.request_id
        environ["REMOTE_ADDR"] = connection.peer
        return environ

    def _respond(self, connection: Connection, response: AppResponse) -> None:
        head = connection.head
        status = response.code
        if status >= 400 or connection.half_closed:  # TorchServe closes after every error
            connection.close_after = True
        if status == 413:
            self._too_large(connection)
            return
        body = response.body
        if head is not None and head.method == "HEAD":
            body = b""
        lines = self._head_lines(connection, response)
        self._note(connection, status)
        connection.phase = Phase.SEND
        if len(body) > _SMALL_BODY:
            connection.queue(lines)
            connection.queue(body)
            self._send(connection)
            return
        self._send(connection, lines + body)

    def _head_lines(self, connection: Connection, response: AppResponse) -> bytes:
        fields = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
        last = "close" if connection.close_after else "keep-alive"
        return f"HTTP/1.1 {response.status}\r\n{fields}connection: {last}\r\n\r\n".encode("latin-1")

    def _send(self, connection: Connection, data: bytes = b"") -> None:
        """Sends what is queued and `data`; when all is gone, the connection is ready for its next request."""
        try:
            sent = connection.send_now(data) if data else connection.send_queued()
        except OSError:
            self._client_gone(connection)
            return
        if sent:
            self._sent(connection)
        else:
            self._wait_to_send(connection)

    def _wait_to_send(self, connection: Connection) -> None:
        connection.phase = Phase.SEND
        connection.limit_at = time.monotonic() + SEND_LIMIT_S
        self._watch(connection, select.EPOLLOUT)

    def _sent(self, connection: Connection) -> None:
        if connection.release_slot >= 0:
            self._release_sent(connection)
        if self._received.total:
            self._received.note(connection, 0)
        if connection.close_after:
            self._linger(connection)
            return
        connection.answered_ns = self._now_ns
        connection.next_request()
        connection.limit_at = self._now_ns / 1e9 + IDLE_LIMIT_S
        if connection.events != READ_EVENTS:
            self._watch(connection, READ_EVENTS)
        if connection.buffer:
            self._ready.append(connection)

    def _continue_sending(self, connection: Connection) -> None:
        if connection.phase == Phase.STREAM:
            if connection.send_queued():
                self._watch(connection, self._reading(connection))
        else:
            self._send(connection)
        if connection in self._unsent:
            self._unsent.note(connection, connection.unsent)

    @staticmethod
    def _reading(connection: Connection) -> int:
        """What to wait for while a request is under way: the client leaves, or sends ahead as much as it may."""
        return 0 if connection.half_closed or len(connection.buffer) > MAX_AHEAD else READ_EVENTS

    def _linger(self, connection: Connection) -> None:
        """Closes so that the answer arrives: closing with unread bytes would make the kernel send RST instead."""
        if connection.half_closed:
            self._close(connection)
            return
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        connection.phase = Phase.LINGER
        connection.limit_at = time.monotonic() + LINGER_LIMIT_S
        self._watch(connection, READ_EVENTS)

    def _ignorable(self, connection: Connection) -> int:
        """How many bytes a lingering client may still send: many clients read the answer only when all is sent."""
        length = connection.head.content_length if connection.head is not None else 0
        return LINGER_BYTES + (length if length <= self._limit else 0)

    # -- streamed answers

    def _start_stream(self, connection: Connection, response: AppResponse) -> None:
        head = connection.head
        connection.phase = Phase.STREAM
        connection.stream_chunked = head is not None and head.http_1_1
        if connection.stream_chunked:
            response.headers.append(("transfer-encoding", "chunked"))
        else:
            connection.close_after = True
        connection.queue(self._head_lines(connection, response))
        self._note(connection, response.code)

    def _pump(self, connection: Connection, slot: int) -> None:
        """Moves a stream's chunks from the slot to the socket; the model worker never waits for a slow reader."""
        client = self._plane.client  # type: ignore[union-attr]
        state = client.state(slot)
        only_head = connection.head is not None and connection.head.method == "HEAD"
        for chunk in client.read_stream(slot):
            if chunk and not only_head:
                connection.queue(b"%x\r\n%b\r\n" % (len(chunk), chunk) if connection.stream_chunked else chunk)
        if state != SlotState.STREAMING:
            self._streams.discard(slot)
            del self._waiting[slot]
            connection.slot = -1
            client.release(slot)
            if state == SlotState.FAILED:
                # No terminating chunk: the client must not take a broken stream for a whole one.
                with contextlib.suppress(OSError):
                    connection.send_queued()
                self._close(connection)
                return
            if connection.stream_chunked and not only_head:
                connection.queue(b"0\r\n\r\n")
        if state != SlotState.STREAMING:
            self._send(connection)
            if connection in self._unsent:
                self._unsent.note(connection, connection.unsent)
            return
        try:
            sent = connection.send_queued()
        except OSError:
            self._client_gone(connection)
            return
        if not sent:
            self._watch(connection, select.EPOLLOUT)
            self._limit_unsent(connection)
        elif connection in self._unsent:
            self._unsent.note(connection, 0)

    def _limit_unsent(self, connection: Connection) -> None:
        """Ends the stream of a client that takes too little of it: too little by itself, or the least of too many."""
        if connection.unsent > MAX_UNSENT_STREAM:
            self._client_gone(connection)
            return
        self._unsent.note(connection, connection.unsent)
        while self._unsent.is_exceeded:
            self._client_gone(self._unsent.largest())

    # -- errors of the HTTP layer, log and counters

    def _refuse(self, connection: Connection, bad: BadHead) -> None:
        """Answers what is not a request, or not one that arrives; the connection ends."""
        self._abandon_slot(connection)
        connection.request_id = self._ids.new()
        connection.close_after = True
        connection.arrival_ns = connection.arrival_ns or self._now_ns
        self._answer_error(
            connection,
            ServerError(bad.message, status=bad.status, type_name="BadRequestException"),
            NO_REQUEST,
        )

    def _request_failed(self, connection: Connection) -> None:
        """Ends a request that an unexpected exception has come of; call it where that is handled.

        It is answered 500 when nothing of an answer was sent, else its connection is closed.
        """
        head = connection.head
        line = head.line if head is not None else "- - -"
        log.exception("Unexpected error in request %s, %s", connection.request_id or "-", line)
        try:
            if connection.phase in (Phase.HEAD, Phase.BODY, Phase.ANSWER) and not connection.closed:
                self._forget_slot(connection)
                self._abandon_slot(connection)
                connection.request_id = connection.request_id or self._ids.new()
                connection.arrival_ns = connection.arrival_ns or self._now_ns
                self._answer_error(connection, InternalServerError(UNEXPECTED), NO_REQUEST)
                return
        except Exception:
            log.exception("Request %s cannot be answered either", connection.request_id)
        self._client_gone(connection)

    def _answer_error(self, connection: Connection, error: ServerError, request: Mapping[str, str] = AS_SENT) -> None:
        """Answers with an error before any resource is asked; `request` stands in for what is not known of it."""
        environ = self._environ(connection)
        environ.update(request)
        environ[ERROR_KEY] = error
        self._respond(connection, call_app(self._apps[connection.listener], environ))

    def _refuse_plain(self, connection: Connection) -> None:
        """Answers plain HTTP on an https listener, as TorchServe does: in plain HTTP, then closes."""
        sock = connection.sock
        if not isinstance(sock, TlsSocket):
            raise RuntimeError("plain HTTP is what this connection speaks")
        connection.request_id = self._ids.new()
        connection.close_after = True
        connection.arrival_ns = self._now_ns
        response = AppResponse()
        body = encode_json({"status": "This TorchServe instance only accepts HTTPS requests"})
        headers = {
            **BASE_HEADERS,
            "x-request-id": connection.request_id,
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        response.start("403 Forbidden", list(headers.items()))
        self._note(connection, response.code)
        try:
            sock.send_plain(self._head_lines(connection, response) + body)
        except OSError:
            self._close(connection)
            return
        self._linger(connection)

    def _too_large(self, connection: Connection) -> None:
        """413 as TorchServe sends it, without reading the body."""
        self._abandon_slot(connection)
        connection.close_after = True
        connection.queue(_TOO_LARGE)
        self._note(connection, 413)
        self._send(connection)

    def _note(self, connection: Connection, status: int) -> None:
        """One line for the access log, one count for the metrics; both leave the process once per turn."""
        head = connection.head
        line = head.line if head is not None else "- - -"
        took_ms = (time.monotonic_ns() - connection.arrival_ns) // 1_000_000
        self._access.add(connection.peer, line, status, took_ms)
        self._counts[0 if 200 <= status < 300 else 1 if 400 <= status < 500 else 2] += 1

    def _flush_counts(self) -> None:
        for place, word in enumerate((WebWord.RESPONSES_2XX, WebWord.RESPONSES_4XX, WebWord.RESPONSES_5XX)):
            count = self._counts[place]
            if count:
                self._board.words[self._web_row + word] += count
                self._counts[place] = 0
