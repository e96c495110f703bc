"""Phase 2 of a request in a web worker: from a finished slot to bytes on the wire.

`AnswerSide` holds the table of connections and everything that ends a request: calling the app with the finished
ticket, sending, streaming, lingering, closing, the access log and the counters. `RequestSide` adds phase 1.
"""

from __future__ import annotations

import contextlib
import io
import logging
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from wsgi_ts.access_log import AccessLog
from wsgi_ts.batcher.board import Board
from wsgi_ts.batcher.layout import SlotState, WebWord
from wsgi_ts.connection import MAX_UNSENT_STREAM, Connection, Phase
from wsgi_ts.dataplane import DataPlane, RequestIds, Ticket, ticket_of
from wsgi_ts.errors import ServerError
from wsgi_ts.http_request import BadHead
from wsgi_ts.rest.responses import BASE_HEADERS, ERROR_KEY, encode_json
from wsgi_ts.rest.tokens import ADMITTED_KEY
from wsgi_ts.tls import TlsSocket

if TYPE_CHECKING:
    from wsgi_ts.rest.apps import WebSettings

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
READ_EVENTS = select.EPOLLIN | select.EPOLLRDHUP
_TOO_LARGE = b"HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"
#: Bodies up to this size are copied out of the slot and sent with the head; larger ones are sent from the slot.
_SMALL_BODY = 16384

_AS_SENT: Mapping[str, str] = {}

StartResponse = Callable[..., Any]
WSGIApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class AnswerSide:
    """The connections of one web worker, and the second half of every request.

    Args:
        settings: the instance.
        apps: the WSGI app of each listening socket.
        sockets: the listening sockets.
        plane: the data plane; None where no predictions are served.
        contexts: the TLS settings of each listening socket, None where it speaks plain HTTP.
    """

    def __init__(
        self,
        settings: WebSettings,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
    ) -> None:
        self._settings = settings
        self._apps = apps
        self._plane = plane
        self._limit = settings.config.max_request_size
        self._base_environs = [
            _base_environ(sock, "http" if context is None else "https")
            for sock, context in zip(sockets, contexts, strict=True)
        ]
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._waiting: dict[int, Connection | None] = {}  # slot -> who waits; None: the client has gone
        self._streams: set[int] = set()
        #: Connections whose answer is sent and whose next request has already arrived.
        self._ready: list[Connection] = []
        self._access = AccessLog(settings.log_files.access)
        self._counts = [0, 0, 0]
        self._board = plane.board if plane is not None else Board.attach(settings.prefix)
        self._web_row = plane.web_row if plane is not None else self._board.control_web_row
        self._ids = RequestIds()
        self._now_ns = time.monotonic_ns()
        #: Smoothed time from a request to its answer while few are under way; what `_spin` goes by.
        self._quick_ns = SPIN_LIMIT_NS

    def _collect(self, plane: DataPlane) -> None:
        client = plane.client
        for slot in client.answered():
            connection = self._waiting.get(slot)
            streaming = client.state(slot) == SlotState.STREAMING
            if connection is None:
                if streaming:
                    client.read_stream(slot)
                else:
                    self._waiting.pop(slot, None)
                    client.release(slot)
            elif slot in self._streams:
                self._pump(connection, slot)
            else:
                self._answer_slot(plane, connection, slot)

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
            self._streams.add(slot)
            self._start_stream(connection, self._app_response(connection, ticket))
            if connection.fd in self._connections:
                self._pump(connection, slot)
            return
        del self._waiting[slot]
        connection.slot = -1
        ticket = ticket_of(answer, target)
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
        self._release_sent(connection)
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
                self._watch(connection, READ_EVENTS if not connection.half_closed else 0)
            return
        self._send(connection)

    def _release_sent(self, connection: Connection) -> None:
        if connection.release_slot >= 0:
            self._plane.client.release(connection.release_slot)  # type: ignore[union-attr]
            connection.release_slot = -1

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
            return
        try:
            sent = connection.send_queued()
        except OSError:
            self._client_gone(connection)
            return
        if not sent:
            if connection.unsent > MAX_UNSENT_STREAM:
                self._client_gone(connection)
            else:
                self._watch(connection, select.EPOLLOUT)

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
            {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "SERVER_PROTOCOL": "HTTP/1.1"},
        )

    def _answer_error(self, connection: Connection, error: ServerError, request: Mapping[str, str] = _AS_SENT) -> None:
        """Answers with an error before any resource is asked; `request` stands in for what is not known of it."""
        environ = self._environ(connection)
        environ.update(request)
        environ[ERROR_KEY] = error
        self._respond(connection, call_app(self._apps[connection.listener], environ))

    def _refuse_plain(self, connection: Connection) -> None:
        """Answers plain HTTP on an https listener, as TorchServe does (contract §2.2): in plain HTTP, then closes."""
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

    # -- the table of connections

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.events != events:
            connection.events = events
            self._epoll.modify(connection.fd, events)

    def _client_gone(self, connection: Connection) -> None:
        slot = connection.slot
        if slot >= 0 and slot in self._waiting and self._waiting[slot] is connection:
            client = self._plane.client  # type: ignore[union-attr]
            self._waiting[slot] = None
            self._streams.discard(slot)
            client.cancel(slot)
            if connection.target is not None and connection.target.is_continuous:
                log.info("Connection to client got closed; Removing job: %s", connection.request_id)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is None:
            return
        self._abandon_slot(connection)
        connection.out.clear()
        self._release_sent(connection)
        connection.sock.close()

    def _abandon_slot(self, connection: Connection) -> None:
        """Gives back the slot of a request that will not be submitted any more."""
        slot = connection.slot
        if slot >= 0 and slot not in self._waiting:
            connection.body_room = None
            connection.slot = -1
            self._plane.client.abandon(slot)  # type: ignore[union-attr]


_NO_INPUT = io.BytesIO(b"")


class AppResponse:
    """What the app has returned, as one object."""

    __slots__ = ("body", "code", "headers", "status")

    def __init__(self) -> None:
        self.status = "500 "
        self.code = 500
        self.headers: list[tuple[str, str]] = []
        self.body: bytes | memoryview = b""

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        """WSGI's start_response."""
        self.status = status
        self.code = int(status[:3])
        self.headers = headers
        return self._no_write

    @staticmethod
    def _no_write(_: bytes) -> None:
        raise NotImplementedError("the write() callable of PEP 3333 is not offered; return an iterable")


def call_app(app: WSGIApp, environ: dict[str, Any]) -> AppResponse:
    """Calls the app and gathers its answer; a single body part is not copied."""
    response = AppResponse()
    parts = app(environ, response.start)
    if type(parts) is list and len(parts) == 1:
        response.body = parts[0]
        return response
    response.body = b"".join(parts)
    close = getattr(parts, "close", None)
    if close is not None:
        close()
    return response


def _base_environ(sock: socket.socket, scheme: str) -> dict[str, Any]:
    """The WSGI variables that are the same for all requests of a listener."""
    name = sock.getsockname()
    server, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else (str(name), "")
    return {
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": _NO_INPUT,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "SCRIPT_NAME": "",
        "SERVER_NAME": server,
        "SERVER_PORT": port,
        ADMITTED_KEY: True,
    }
