"""The first half of a request in a web worker: from bytes to a submitted slot.

The head is parsed, the model found, and the body received where it belongs: a large one straight into the slot. What is
no prediction is handed to the app when its body is complete, in a thread of the pool where it may block.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from wsgi_ts.batcher.shm.layout import TOO_LATE, RequestFlag
from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.errors import OutOfResources, RequestTimeout, ServiceUnavailable
from wsgi_ts.http.form_field import is_form
from wsgi_ts.http.head import BadHead, Head
from wsgi_ts.plugins.auth import Decision
from wsgi_ts.rest.inference import ROUTES_KEY
from wsgi_ts.rest.management import may_wait
from wsgi_ts.rest.plugin_endpoints import first_segment
from wsgi_ts.rest.responses import HEAD_KEY
from wsgi_ts.security.access import Access
from wsgi_ts.security.cross_site import is_preflight
from wsgi_ts.web.answers import NO_REQUEST, Answers
from wsgi_ts.web.app import AppThreads, call_app, environ_of
from wsgi_ts.web.bodies import CONTINUE, DIRECT_BODY_BYTES, Bodies
from wsgi_ts.web.connection import Connection, Phase, SlotBody
from wsgi_ts.web.events import wants_events
from wsgi_ts.web.gate import GatedAccess
from wsgi_ts.web.plugins import PluginEndpoint
from wsgi_ts.web.sending import events_ahead
from wsgi_ts.web.table import READ_EVENTS, ConnectionTable

log = logging.getLogger(__name__)

HEAD_LIMIT_S: Final = 10.0
RECEIVE_BYTES: Final = 65536
#: What a lingering client may send besides the body that it has announced.
LINGER_BYTES: Final = 256 * 1024
#: The most that is discarded of an announced body; chunks may have no end. TorchServe discards all of it.
DISCARD_BYTES: Final = 256 << 20
#: A client that sends its body at least as fast, in bytes per second, has the time to finish; so many seconds of it it
#: can be ahead.
_DISCARD_RATE: Final = 65536.0
_DISCARD_AHEAD_S: Final = 10.0
#: A beginning of a head up to this is not counted: a connection takes as much by itself.
_LEAST_COUNTED: Final = 1024


class Requests:
    """Reads requests and submits them.

    Args:
        wake: wakes the loop; called on a thread.
        answers_preflights: whether browsers are told what pages of other sites may send.

    Attributes:
        calls: what threads have answered.
        bodies: receives bodies.
        is_stopping: no connection is accepted any more.
        is_leaving: from now on every connection ends with its answer.
    """

    def __init__(
        self,
        table: ConnectionTable,
        answers: Answers,
        exchange: Exchange[Connection] | None,
        most_body_bytes: int,
        wake: Callable[[], None],
        *,
        answers_preflights: bool = False,
    ) -> None:
        self._answers_preflights = answers_preflights
        self.calls = AppThreads(wake)
        self._decided: Decision | None = None
        self.is_stopping = False
        self.is_leaving = False
        self._table = table
        self._answers = answers
        self._exchange = exchange
        self._limit = most_body_bytes
        self.bodies = Bodies(table, answers, most_body_bytes)
        #: Slow clients must leave some slots for requests that are complete.
        self._most_receiving = exchange.client.capacity // 2 if exchange is not None else 0

    def receive(self, connection: Connection) -> None:
        """Takes what the socket has.

        Raises:
            OSError: the client has gone.
        """
        phase = connection.phase
        if phase == Phase.BODY and type(connection.body) is SlotBody:
            self.receive_direct(connection)
            return
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._end_of_stream(connection)
        elif phase == Phase.HEAD:
            connection.buffer = connection.buffer + data if connection.buffer else data
            self.read(connection)
        elif phase == Phase.BODY:
            body = self.bodies.more(connection, data)
            if body is not None:
                self._body_complete(connection, body)
        elif phase == Phase.LINGER:
            self._ignore(connection, len(data))
        elif phase == Phase.REFUSE:
            self._answers.http2.go_on(connection, data)
        else:
            connection.buffer += data
            received = self._table.received
            received.note(connection, len(connection.buffer))
            # Where all together have sent too much ahead, this one sends no more until it is answered.
            self._table.watch(connection, 0 if received.is_exceeded else events_ahead(connection))

    def _ignore(self, connection: Connection, count: int) -> None:
        """Discards what a lingering client sends: many read the answer only when all of their request is sent."""
        connection.ignored += count
        earned = min(connection.limit_at + count / _DISCARD_RATE, time.monotonic() + _DISCARD_AHEAD_S)
        connection.limit_at = max(connection.limit_at, earned)
        length = connection.head.content_length if connection.head is not None else 0
        if connection.ignored > LINGER_BYTES + min(length, DISCARD_BYTES):
            self._table.close(connection)

    def _end_of_stream(self, connection: Connection) -> None:
        """The client has sent all it will. It may have closed, or only its sending half."""
        connection.half_closed = True
        if connection.phase in (Phase.HEAD, Phase.BODY, Phase.LINGER, Phase.REFUSE):
            self._table.client_gone(connection)
            return
        self._table.watch(connection, connection.events & ~READ_EVENTS)
        connection.close_after = True
        if connection.phase == Phase.ANSWER and connection.head is not None and connection.head.http_1_1:
            # An interim answer changes nothing for a client that still reads (RFC 9110 15.2), and makes the kernel of
            # one that has closed say so at once.
            connection.sock.send(CONTINUE)

    def give_up(self, connection: Connection) -> None:
        """Ends what has passed its time limit: answers if the client is owed an answer, else closes."""
        phase = connection.phase
        if phase == Phase.BODY and self.bodies.goes_on(connection):
            return
        if phase == Phase.BODY or (phase == Phase.HEAD and connection.buffer):
            self._answers.refuse(connection, BadHead(408, "The request did not arrive in time."))
        elif connection.target is not None and connection.target.graph is not None and self._walks(connection):
            limit_ns = self._table.exchange.walks.look(connection.slot)
            if limit_ns:
                self._table.limit_answer(connection, limit_ns)
        elif phase == Phase.ANSWER and connection.target is not None:
            # What has not begun will not be, since the slot is cancelled; what runs is answered to nobody.
            self._table.forget_slot(connection)
            self._answers.answer(connection, RequestTimeout(TOO_LATE))
        elif phase == Phase.ANSWER and connection.limit_at:
            # Of all other calls only those of plugins have a limit.
            self._answers.error(connection, self.calls.give_up(connection))
        elif phase in (Phase.ANSWER, Phase.STREAM):
            connection.limit_at = 0.0
        else:
            self._table.client_gone(connection)

    @staticmethod
    def _walks(connection: Connection) -> bool:
        """Whether a workflow's request is under way whose nodes have limits of their own."""
        return connection.phase == Phase.ANSWER or connection.sends_events

    def read(self, connection: Connection) -> None:
        """Reads as many requests as can be answered now (one at a time: pipelined answers keep their order)."""
        while connection.buffer and connection.phase == Phase.HEAD and not connection.closed:
            try:
                head = connection.next_head()
            except BadHead as bad:
                if connection.opens_with_http2:
                    self._answers.http2.begin(connection)
                else:
                    self._answers.refuse(connection, bad)
                return
            if head is None:
                connection.limit_at = min(connection.limit_at, time.monotonic() + HEAD_LIMIT_S)
                if len(connection.buffer) > _LEAST_COUNTED:
                    self.bodies.hold(connection, len(connection.buffer), NO_REQUEST)
                return
            if self._table.received.total:
                self._table.received.note(connection, 0)
            self._begin(connection, head)

    def _begin(self, connection: Connection, head: Head) -> None:
        connection.head = head
        connection.request_id = self._table.ids.new()
        connection.arrival_ns = self._table.now_ns
        connection.close_after = not head.keep_alive or connection.half_closed or self.is_leaving
        if head.content_length > self._limit:
            self._answers.too_large(connection)
            return
        if head.method == "OPTIONS" and self._is_preflight(head):
            # It carries no token, runs nothing, and is told nothing but what the keys of CORS say.
            connection.target = None
            self._call_app(connection, b"")
            return
        access = connection.endpoint.access
        if access is not None and not access.has_admitted(head) and not self._admit(connection, head, access):
            return
        exchange = self._exchange
        target = exchange.routes.target_of(head) if exchange is not None else None
        connection.target = target
        if target is None or exchange is None:
            self._receive_body(connection, head)
        elif target.error is None:
            self._begin_prediction(exchange, connection, head, target)
        elif target.reads_form and is_form(head.content_type):
            self._receive_body(connection, head)
        else:
            self._answers.answer(connection, exchange.refuse(target, target.error))

    def _is_preflight(self, head: Head) -> bool:
        has_body = head.chunked or head.content_length > 0
        return self._answers_preflights and not has_body and is_preflight(head.environ)

    def _admit(self, connection: Connection, head: Head, access: Access | GatedAccess) -> bool:
        """Returns whether a request may go on now; one that may not is answered, or waits for what plugins decide."""
        refusal = access.refusal_of(head)
        if refusal is None and isinstance(access, GatedAccess):
            decision, self._decided = self._decided, None
            if decision is not None:
                return self._passes(connection, decision)
            target = self._exchange.routes.target_of(head) if self._exchange is not None else None
            return self._ask_plugins(connection, head, access, target.model_name if target is not None else "")
        if refusal is not None:
            self._answers.error(connection, refusal)
        return refusal is None

    def _ask_plugins(self, connection: Connection, head: Head, access: GatedAccess, model: str) -> bool:
        """Asks whether a request may go on, now; `decided` is told later where that cannot be said at once."""
        decision = access.known(head, connection.peer, connection.sock, model)
        if decision is not None:
            return self._passes(connection, decision)
        connection.phase = Phase.ANSWER
        self._table.limit_answer(connection, time.monotonic_ns() + int(access.gate.timeout_s * 1e9))
        ask = partial(access.decide, head, connection.peer, connection.sock, model)
        self.calls.ask_gate(connection, access.gate, access.threads, ask)
        return False

    def _passes(self, connection: Connection, decision: Decision) -> bool:
        if decision.refusal is not None:
            self._answers.error(connection, decision.refusal)
        return decision.refusal is None

    def decided(self, connection: Connection, decision: Decision) -> None:
        """Begins a request again, or goes on with its form, now that plugins have decided whether it may."""
        head = connection.head
        if head is None:
            raise RuntimeError("a decision without a request")
        connection.phase, connection.limit_at = Phase.HEAD, 0.0
        # What has come meanwhile was counted, and may have been enough for the time being.
        if self._table.received.total:
            self._table.received.note(connection, 0)
        if not connection.half_closed:
            self._table.watch(connection, READ_EVENTS)
        form, target, exchange = connection.form, connection.target, self._exchange
        if form is not None and target is not None and exchange is not None:
            connection.form = None
            if self._passes(connection, decision):
                self._ask_model(exchange, connection, target, form)
            return
        self._decided = decision
        try:
            self._begin(connection, head)
        finally:
            self._decided = None

    def _begin_prediction(
        self, exchange: Exchange[Connection], connection: Connection, head: Head, target: Target
    ) -> None:
        length = head.content_length
        buffer = connection.buffer
        is_complete = not head.chunked and length <= len(buffer)
        if not is_complete:
            if head.chunked or length <= DIRECT_BODY_BYTES:
                self._receive_body(connection, head)
                return
            if self._table.receiving >= self._most_receiving:
                exchange.refuse(target, ServiceUnavailable(""))
                self._answers.unavailable(connection, "Too many request bodies are being received. ")
                return
        if self._take_slot(exchange, connection, target):
            if is_complete:
                connection.buffer = buffer[length:]
                self._submit(exchange, connection, target, buffer[:length], length)
            elif self.bodies.begin_direct(connection, head):
                self._submit(exchange, connection, target, None, length)

    def _take_slot(self, exchange: Exchange[Connection], connection: Connection, target: Target) -> bool:
        """Takes a slot for a prediction; False where there is none for its model, which is answered."""
        try:
            connection.slot = exchange.take(target)
        except ServiceUnavailable as error:
            self._answers.answer(connection, error)
            return False
        return True

    def receive_direct(self, connection: Connection) -> None:
        """Goes on with a body that is received straight into its slot.

        Raises:
            OSError: the client has gone.
        """
        if self.bodies.receive_direct(connection) and connection.target is not None and connection.head is not None:
            length = connection.head.content_length
            self._submit(self._table.exchange, connection, connection.target, None, length)

    def _receive_body(self, connection: Connection, head: Head) -> None:
        """Has a body received into memory; a slot is taken when it is complete, if it takes one."""
        body = self.bodies.begin(connection, head)
        if body is not None:
            self._body_complete(connection, body)

    def _body_complete(self, connection: Connection, body: bytes) -> None:
        """Goes on with a request whose body is in memory."""
        target, head, exchange = connection.target, connection.head, self._exchange
        if target is None and head is not None and connection.endpoint.plugins:
            plugin = connection.endpoint.plugins.get(first_segment(head.path))
            if plugin is not None and not plugin.is_stuck:
                self._ask_plugin(connection, plugin, body)
                return
            if exchange is not None and plugin is not None and head.method != "OPTIONS":
                target = connection.target = exchange.routes.target(head.path, head.query)
        if target is None or head is None or exchange is None:
            self._call_app(connection, body)
            return
        if target.reads_form:
            target = connection.target = exchange.routes.form_target(head.content_type, body)
            access = connection.endpoint.access
            if target.model_name and isinstance(access, GatedAccess):
                connection.form = body
                if not self._ask_plugins(connection, head, access, target.model_name):
                    return
                connection.form = None
        self._ask_model(exchange, connection, target, body)

    def _ask_model(self, exchange: Exchange[Connection], connection: Connection, target: Target, body: bytes) -> None:
        if target.error is not None:
            self._answers.answer(connection, exchange.refuse(target, target.error))
        elif self._take_slot(exchange, connection, target):
            self._submit(exchange, connection, target, body, len(body))
            self._table.received.note(connection, 0)

    # Complete requests

    def _submit(
        self, exchange: Exchange[Connection], connection: Connection, target: Target, body: bytes | None, length: int
    ) -> None:
        head = connection.head
        if head is None:
            raise RuntimeError("a request without a head")
        came_ns, idle_us = connection.arrival_ns, connection.idle_us
        connection.submitted_ns = self._table.now_ns
        raw, flags, traces = head.raw, 0, exchange.traces
        if traces is None or not traces.has_spans:
            pass
        elif traces.gap > 1 and head.traceparent is None and not head.tracestate:
            traces.gap -= 1
        else:
            raw, connection.trace, connection.parent = traces.begin(raw, head.traceparent, head.tracestate)
            flags = RequestFlag.SAMPLED if connection.trace is not None else 0
        name = connection.request_id
        request = Request(target, name, raw, head.content_type, body, length, came_ns, idle_us, b"", flags)
        try:
            connection.slot = exchange.submit(connection.slot, connection, target, request)
        except OutOfResources as error:
            connection.slot = -1
            self._answers.answer(connection, error)
            return
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        if target.client_timeout_ms:
            limit_ns = came_ns + target.client_timeout_ms * 1_000_000
            if target.graph is not None:
                limit_ns = exchange.walks.limit_of(connection.slot)
            self._table.limit_answer(connection, limit_ns)
            if target.graph is not None and wants_events(head):
                exchange.walks.watch(connection.slot)
                self._answers.begin_events(connection)
        if connection.half_closed:
            self._table.watch(connection, connection.events & ~READ_EVENTS)

    def _ask_plugin(self, connection: Connection, plugin: PluginEndpoint, body: bytes) -> None:
        environ = self._environ_with(connection, body)
        environ["CONTENT_LENGTH"] = str(len(body))  # of a chunked body, too
        connection.phase = Phase.ANSWER
        self._table.limit_answer(connection, time.monotonic_ns() + int(plugin.found.timeout_s * 1e9))
        self.calls.ask_plugin(connection, environ, plugin)

    def _environ_with(self, connection: Connection, body: bytes) -> dict[str, Any]:
        environ = environ_of(connection)
        environ["wsgi.input"] = io.BytesIO(body)
        if connection.head is not None:
            environ[HEAD_KEY] = connection.head.raw
        return environ

    def _call_app(self, connection: Connection, body: bytes) -> None:
        environ = self._environ_with(connection, body)
        environ[ROUTES_KEY] = self._exchange.routes if self._exchange is not None else None
        if not connection.endpoint.may_block:
            self._answers.respond(connection, call_app(connection.endpoint.app, environ))
            return
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        self.calls.submit(connection, environ, waits=may_wait(environ))
