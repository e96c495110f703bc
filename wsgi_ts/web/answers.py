"""The second half of a request in a web worker: from a finished slot, or an error, to bytes on the wire."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, read_times
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.dataplane.task import Task
from wsgi_ts.dataplane.timings import timings_of
from wsgi_ts.errors import InternalServerError, PayloadTooLarge, ServerError, ServiceUnavailable
from wsgi_ts.http.head import BadHead
from wsgi_ts.rest.inference import ANSWER_KEY
from wsgi_ts.rest.responses import BASE_HEADERS, ERROR_KEY, UNEXPECTED, encode_json
from wsgi_ts.security.tls import TlsSocket
from wsgi_ts.web.app import call_app, environ_of
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.events import EVENT_TYPE, body_event, error_event, node_event
from wsgi_ts.web.http2_clients import Http2Clients
from wsgi_ts.web.load_header import LoadHeader
from wsgi_ts.web.report import NO_LINE, Report
from wsgi_ts.web.sending import Sender, send_queued
from wsgi_ts.web.table import ConnectionTable

log = logging.getLogger(__name__)

#: With at most this many requests under way, and answers that take no longer than this, the loop looks for them
#: actively (see `WebLoop._wait`).
SPIN_IN_FLIGHT: Final = 24
SPIN_LIMIT_NS: Final = 1_000_000
_TOO_LARGE: Final = b"HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"
#: Bodies up to this size are copied out of the slot and sent with the head; larger ones are sent from the slot.
_SMALL_BODY: Final = 16384

#: A stream whose handler has failed.
_FAILED = InternalServerError("Prediction failed")

AS_SENT: Mapping[str, str] = {}
#: What stands in for a request that could not be read.
NO_REQUEST: Final = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "", "SERVER_PROTOCOL": "HTTP/1.1"}


class Answers:
    """Answers requests and ends connections.

    Args:
        load: the header that tells how busy the server is; None: answers do not tell.
        tells_times: answers to predictions tell where their time went.

    Attributes:
        http2: refuses clients of HTTP/2.
        quick_ns: smoothed time from a request to its answer while few are under way.
    """

    def __init__(
        self,
        table: ConnectionTable,
        sender: Sender,
        exchange: Exchange[Connection] | None,
        report: Report,
        load: LoadHeader | None = None,
        *,
        tells_times: bool = False,
    ) -> None:
        self.quick_ns = SPIN_LIMIT_NS
        self._table = table
        self._sender = sender
        self._exchange = exchange
        self._report = report
        self._load = load
        self._tells_times = tells_times
        self._has_told_of_size = False
        self.http2 = Http2Clients(table, sender, report)
        if exchange is not None:
            exchange.walks.deliver = self._deliver
            exchange.walks.attempts.limit = table.limit_answer
            exchange.walks.progress = self._tell_of_node

    def collect(self) -> None:
        """Looks after all slots of which there is news."""
        exchange = self._exchange
        if exchange is None:
            return
        for slot, connection in exchange.news():
            try:
                if connection.phase == Phase.STREAM:
                    if connection.sends_events:
                        self._send_events(exchange, connection, slot)
                    else:
                        self._pump(exchange, connection)
                else:
                    self._answer_slot(exchange, connection, slot)
            except Exception:
                self.fail(connection)

    def _answer_slot(self, exchange: Exchange[Connection], connection: Connection, slot: int) -> None:
        target = connection.target
        if target is None:
            raise RuntimeError("an answered slot without target")
        answer = exchange.answer(slot, target)
        connection.answered_slot = slot
        if target.graph is not None:
            connection.walk = answer.walk
        if exchange.client.in_flight <= SPIN_IN_FLIGHT:
            took_ns = min(time.monotonic_ns() - connection.arrival_ns, 2 * SPIN_LIMIT_NS)
            self.quick_ns += (took_ns - self.quick_ns) // 8
        if answer.stream is not None:
            response = self._response_to(connection, answer)
            if self._tells_times and target.graph is None:
                response.headers.append(("server-timing", self._timings(exchange, connection)))
            connection.slot = slot
            connection.begin_stream(response)
            self._report.note(connection, response.status)
            self._pump(exchange, connection)
            return
        connection.slot = -1
        if len(answer.body) <= _SMALL_BODY:
            answer.body = bytes(answer.body)
            exchange.finish(slot)
        else:
            exchange.keep_for_sending(slot)
            connection.release_slot = slot
        direct = connection.endpoint.direct
        is_direct = direct is not None and (
            direct.is_for(answer) or (target.graph is not None and direct.is_for_workflow(answer))
        )
        if direct is None or not is_direct or connection.wants_head_only:
            self.respond(connection, self._response_to(connection, answer))
            return
        if connection.half_closed:
            connection.close_after = True
        lines = direct.head(answer, connection.request_id, connection.after_answer)
        self._send_answer(connection, answer.status, lines, answer.body)

    @staticmethod
    def _response_to(connection: Connection, answer: Answer) -> Answer:
        """Returns what the app makes of a prediction's answer."""
        environ = environ_of(connection)
        environ[ANSWER_KEY] = answer
        connection.fault = answer.error
        return call_app(connection.endpoint.app, environ)

    def _deliver(self, connection: Connection, answer: Answer) -> None:
        """Answers a workflow's request whose answer lies in no slot."""
        connection.slot = -1
        connection.walk = answer.walk
        try:
            if connection.sends_events:
                connection.fault = answer.error
                body = body_event("answer", bytes(answer.body)) if answer.error is None else error_event(answer.error)
                self._end_events(connection, body)
                return
            self.respond(connection, self._response_to(connection, answer))
        except Exception:
            self.fail(connection)

    # Events of a workflow

    def begin_events(self, connection: Connection) -> None:
        """Begins to stream events as the answer to a submitted request of a workflow."""
        answer = Answer()
        answer.headers, answer.stream = [("content-type", EVENT_TYPE)], ()
        response = self._response_to(connection, answer)
        connection.sends_events = True
        connection.begin_stream(response)
        self._report.note(connection, response.status)
        self._sender.flush(connection)

    def _tell_of_node(self, connection: Connection, name: str, task: Task) -> None:
        connection.queue_chunk(node_event(name, task.item, task.took_ns, task.state))
        self._sender.flush(connection)

    def _send_events(self, exchange: Exchange[Connection], connection: Connection, slot: int) -> None:
        """Sends the whole answer as one event, or the new chunks of a streamed one as an event each."""
        target = connection.target
        if target is None:
            raise RuntimeError("an answered slot without target")
        if connection.slot != slot:
            answer = exchange.answer(slot, target)
            connection.walk = answer.walk
            if answer.stream is None:
                body = bytes(answer.body)
                connection.slot = -1
                exchange.finish(slot)
                self._end_events(connection, body_event("answer", body))
                return
            connection.slot = slot
        chunks, state = exchange.chunks(slot)
        for chunk in chunks:
            connection.queue_chunk(body_event("chunk", chunk))
        if state == SlotState.STREAMING:
            self._sender.flush(connection)
            return
        connection.slot = -1
        exchange.finish(slot)
        connection.fault = _FAILED if state == SlotState.FAILED else None
        self._end_events(connection, body_event("answer", b"") if connection.fault is None else error_event(_FAILED))

    def _end_events(self, connection: Connection, last: bytes) -> None:
        connection.queue_chunk(last)
        connection.end_stream()
        connection.sends_events = False
        self._report.end_stream(connection)
        self._sender.send(connection)
        self._sender.note_unsent(connection)

    # Events that are no answer of a model

    def begin_feed(self, connection: Connection, response: Answer) -> None:
        """Begins an answer that goes on: what the app has returned is its first part."""
        response.headers = [(name, value) for name, value in response.headers if name.lower() != "content-length"]
        connection.limit_at = 0.0
        connection.begin_stream(response)
        self._report.note(connection, response.status)
        self.feed(connection, bytes(response.body))

    def feed(self, connection: Connection, part: bytes) -> None:
        """Sends the next part of it."""
        connection.queue_chunk(part)
        self._sender.flush(connection)

    def end_feed(self, connection: Connection) -> None:
        """Ends it."""
        connection.end_stream()
        self._sender.send(connection)
        self._sender.note_unsent(connection)

    def drop(self, connection: Connection) -> None:
        """Closes the connection of a client that takes nothing any more."""
        self._table.client_gone(connection)

    def answer(self, connection: Connection, error: ServerError) -> None:
        """Answers a prediction that no model worker has answered."""
        self.respond(connection, self._response_to(connection, Answer(error)))

    def respond(self, connection: Connection, response: Answer) -> None:
        """Sends what the app has returned."""
        status = response.status
        if status >= 400 or connection.half_closed:  # TorchServe closes after every error
            connection.close_after = True
        if status == 413 and not response.body and connection.answered_slot < 0:  # a handler's own has its headers
            self._send_too_large(connection)
            return
        body = b"" if connection.wants_head_only else response.body
        self._send_answer(connection, status, connection.answer_head(response), body)

    def _send_answer(self, connection: Connection, status: int, lines: bytes, body: bytes | memoryview) -> None:
        """Sends a whole answer, and notes it."""
        self._report.note(connection, status)
        exchange = self._exchange
        if self._tells_times and exchange is not None and connection.answered_slot >= 0 and connection.walk is None:
            lines = b"%bserver-timing: %b\r\n\r\n" % (lines[:-2], self._timings(exchange, connection).encode())
        if self._load is not None:
            lines = self._load.add_to(lines, self._table.now_ns)
        connection.phase = Phase.SEND
        if len(body) > _SMALL_BODY:
            connection.queue(lines)
            connection.queue(body)
            self._sender.send(connection)
        else:
            self._sender.send(connection, lines + body)

    @staticmethod
    def _timings(exchange: Exchange[Connection], connection: Connection) -> str:
        """Where the time of the request under way went, whose slot was answered just now."""
        return timings_of(read_times(exchange.client.segment, connection.answered_slot), connection.submitted_ns)

    def too_large(self, connection: Connection) -> None:
        """Refuses a body; the answer has no text that says why, so that the log does."""
        length = connection.head.content_length if connection.head is not None else 0
        log.log(
            logging.DEBUG if self._has_told_of_size else logging.WARNING,
            "%s: a request body %s is refused with 413: max_request_size is the limit. Further ones are at DEBUG",
            connection.peer,
            f"of {length} bytes" if length > 0 else "in chunks",
        )
        self._has_told_of_size = True
        exchange, head, target = self._exchange, connection.head, connection.target
        if exchange is not None and head is not None:
            # Where the head announces too much, nobody has asked yet what its path means.
            target = target or exchange.routes.target_of(head)
            if target is not None:
                exchange.refuse(target, PayloadTooLarge(""))
        self._send_too_large(connection)

    def _send_too_large(self, connection: Connection) -> None:
        """Answers 413 as TorchServe sends it, without reading the body."""
        self._table.abandon_slot(connection)
        connection.close_after = True
        connection.queue(_TOO_LARGE)
        self._report.note(connection, 413)
        self._sender.send(connection)

    def _pump(self, exchange: Exchange[Connection], connection: Connection) -> None:
        """Moves a stream's chunks from the slot to the socket; the model worker never waits for a slow reader."""
        chunks, state = exchange.chunks(connection.slot)
        for chunk in chunks:
            connection.queue_chunk(chunk)
        if state == SlotState.STREAMING:
            self._sender.flush(connection)
            return
        exchange.finish(connection.slot)
        connection.slot = -1
        if state == SlotState.FAILED:
            connection.fault = _FAILED
        self._report.end_stream(connection)
        if state == SlotState.FAILED:
            # No terminating chunk: the client must not take a broken stream for a whole one.
            with contextlib.suppress(OSError):
                send_queued(connection)
            self._table.close(connection)
            return
        connection.end_stream()
        self._sender.send(connection)
        self._sender.note_unsent(connection)

    # Errors of the HTTP layer

    def error(self, connection: Connection, error: ServerError, request: Mapping[str, str] = AS_SENT) -> None:
        """Answers with an error and asks no resource; `request` has the WSGI variables that the head did not give."""
        environ: dict[str, Any] = {**environ_of(connection), **request, ERROR_KEY: error}
        self.respond(connection, call_app(connection.endpoint.app, environ))

    def refuse(self, connection: Connection, bad: BadHead) -> None:
        """Answers a malformed or incomplete request, and ends the connection."""
        self._table.abandon_slot(connection)
        self._table.name_request(connection)
        connection.close_after = True
        self.error(connection, ServerError(bad.message, status=bad.status, type_name="BadRequestException"), NO_REQUEST)

    def unavailable(self, connection: Connection, what: str, request: Mapping[str, str] = AS_SENT) -> None:
        """Answers 503 to a request that may be sent again later, and ends the connection."""
        self._table.abandon_slot(connection)
        self._table.name_request(connection)
        connection.close_after = True
        self.error(connection, ServiceUnavailable(what + "Please try again in a few seconds."), request)

    def fail(self, connection: Connection) -> None:
        """Ends a request after an unexpected exception; to be called in the `except` block.

        It is answered 500 when nothing of an answer was sent, else its connection is closed.
        """
        line = connection.head.line if connection.head is not None else NO_LINE
        log.exception("Unexpected error in request %s, %s", connection.request_id or "-", line)
        try:
            if connection.phase in (Phase.HEAD, Phase.BODY, Phase.ANSWER) and not connection.closed:
                self._table.forget_slot(connection)
                self._table.abandon_slot(connection)
                self._table.name_request(connection)
                self.error(connection, InternalServerError(UNEXPECTED), NO_REQUEST)
                return
        except Exception:
            log.exception("Request %s cannot be answered either", connection.request_id)
        self._table.client_gone(connection)

    def refuse_plain(self, connection: Connection) -> None:
        """Answers plain HTTP on an https listener, as TorchServe does: in plain HTTP, and then closes."""
        sock = connection.sock
        if not isinstance(sock, TlsSocket):
            raise RuntimeError("plain HTTP is what this connection speaks")
        self._table.name_request(connection)
        connection.close_after = True
        body = encode_json({"status": "This TorchServe instance only accepts HTTPS requests"})
        headers = {
            **BASE_HEADERS,
            "x-request-id": connection.request_id,
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        response = Answer()
        response.status, response.phrase, response.headers = 403, "Forbidden", list(headers.items())
        self._report.note(connection, response.status)
        try:
            sock.send_plain(connection.answer_head(response) + body)
        except OSError:
            self._table.close(connection)
            return
        self._sender.linger(connection)
