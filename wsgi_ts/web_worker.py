"""Our gunicorn worker class: one epoll loop that submits requests early and answers them late.

A request in flight is a row in a table: no thread, greenlet or coroutine is made for it. Phase 1 reads the head,
finds the model, receives the body into a slot and pushes the slot to a batcher. Phase 2, when the model worker has
written the answer, calls the WSGI app with the finished ticket in the environ and sends what it returns.
Everything that can be done once per loop turn is: publishing to the batchers, the scan for answers, the access log.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gunicorn.workers.base import Worker

from wsgi_ts.access_log import AccessLog
from wsgi_ts.batcher.layout import SlotState, WebWord
from wsgi_ts.batcher.shared_memory import SharedMemoryFull
from wsgi_ts.connection import (
    DIRECT_BODY_BYTES,
    MAX_AHEAD,
    MAX_UNSENT_STREAM,
    RECEIVE_BYTES,
    Connection,
    Phase,
)
from wsgi_ts.dataplane import DataPlane, RequestIds, Target, Ticket, ticket_of
from wsgi_ts.errors import OutOfResources, ServerError, ServiceUnavailable
from wsgi_ts.http_request import MAX_HEAD, BadHead, ChunkedBody, Head, parse_head

log = logging.getLogger(__name__)

HEAD_LIMIT_S = 10.0
BODY_LIMIT_S = 60.0
#: Longer than nginx's 60 s for idle upstream connections, so that nginx is the one to close.
IDLE_LIMIT_S = 75.0
SEND_LIMIT_S = 60.0
LINGER_LIMIT_S = 2.0
#: At a stop, how long a connection that has sent nothing yet may take to send its request.
SILENT_AT_STOP_S = 1.0
LINGER_BYTES = 256 * 1024
ACCEPTS_PER_TURN = 1
MAX_CONNECTIONS = 10000
POOL_THREADS = 8
SPIN_ALWAYS = 4
CONTENDED_NS = 50_000
CONTENDED_TURNS = 16
GC_THRESHOLD = 50_000
#: With at most this many requests under way, and answers that take no longer than this, the loop looks for them
#: actively (see `_spin`).
SPIN_IN_FLIGHT = 24
SPIN_LIMIT_NS = 1_000_000
_TICK_S = 1.0
_READ = select.EPOLLIN | select.EPOLLRDHUP
_GONE = select.EPOLLHUP | select.EPOLLERR
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 413 Request Entity Too Large\r\ncontent-length: 0\r\n\r\n"
_SMALL_BODY = 16384
_LINE_ENDS = b"\r\n"

StartResponse = Callable[..., Any]
WSGIApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class WebWorker(Worker):  # type: ignore[misc]
    """gunicorn's view of the loop: `init_process` calls `run`, signals clear `alive`."""

    def init_process(self) -> None:
        """Builds the loop's state in the worker process, then lets gunicorn set up signals and call `run`."""
        self._connections: dict[int, Connection] = {}
        self._waiting: dict[int, Connection | None] = {}  # slot -> who waits; None: the client has gone
        self._streams: set[int] = set()
        self._finished_calls: deque[tuple[Connection, _Response]] = deque()
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pool: ThreadPoolExecutor | None = None
        self._plane: DataPlane | None = None
        self._ids = RequestIds()
        self._next_tick = 0.0
        self._quick_ns = SPIN_LIMIT_NS
        self._contended = 0
        super().init_process()

    def load_wsgi(self) -> None:
        """Gets the apps, and everything else that must be there before this worker counts as booted."""
        super().load_wsgi()
        self._open()

    # -- the loop

    def run(self) -> None:
        """Serves until told to stop, then answers what was accepted (at most `graceful_timeout` seconds)."""
        try:
            while self.alive:
                self._turn()
            self._drain()
        finally:
            self._access.flush()

    def _open(self) -> None:
        settings = self.app.settings
        self._settings = settings
        self._apps: list[WSGIApp] = [self.app.app_for(sock) for sock in self.sockets]
        # What may block (a management call waits for workers to load) runs in the pool's threads.
        self._blocking = [self.app.kinds_for(sock) != ("inference",) for sock in self.sockets]
        self._access = AccessLog(settings.config.log_dir)
        self._limit = settings.config.max_request_size
        self._counts = [0, 0, 0]
        if settings.kind == "inference":
            self._plane = DataPlane(settings.config, settings.run_dir, settings.prefix)
            threading.Thread(target=self._listen_to_bell, name="doorbell", daemon=True).start()
        for sock in self.sockets:
            sock.setblocking(False)
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)
        self._listeners = {sock.fileno(): number for number, sock in enumerate(self.sockets)}
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(self.PIPE[0], select.EPOLLIN)
        self._own_fds = {self._wake_fd, self.PIPE[0]}
        self._base_environs = [_base_environ(sock) for sock in self.sockets]
        # What is there now stays; requests make few cycles, so the collector need not look after every 700 objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def _turn(self) -> None:
        plane = self._plane
        if plane is None or not plane.client.in_flight:
            events = self._epoll.poll(_TICK_S)
        else:
            events = self._spin(plane) or self._sleep(plane)
        self._now_ns = time.monotonic_ns()
        if plane is not None:
            plane.routes.refresh()
        for fd, event in events:
            connection = self._connections.get(fd)
            if connection is not None:
                self._on_event(connection, event)
            elif fd in self._listeners:
                self._accept(fd)
            elif fd in self._own_fds:
                _empty(fd)
        if plane is not None:
            plane.client.publish()
            if plane.client.in_flight:
                self._collect(plane)
                plane.client.publish()
        while self._finished_calls:
            connection, response = self._finished_calls.popleft()
            if self._connections.get(connection.fd) is connection:
                self._respond(connection, response)
                self._read_requests(connection)
        self._access.flush()
        self._flush_counts()
        if self._now_ns >= self._next_tick:
            self._tick()

    def _spin(self, plane: DataPlane) -> list[tuple[int, int]] | None:
        """Looks for events and answers for a moment instead of sleeping; None when it is better to sleep.

        Being woken costs two context switches (doorbell thread, loop). Where few requests are under way and answers
        come within a millisecond, looking is cheaper, and faster for the client; others that want the core get it.
        """
        client = plane.client
        if client.in_flight > SPIN_IN_FLIGHT or self._quick_ns > SPIN_LIMIT_NS:
            return None
        if self._contended:
            self._contended -= 1
            return None
        poll, clock = self._epoll.poll, time.monotonic_ns
        now = clock()
        stop_at = now + 2 * self._quick_ns
        while now < stop_at:
            events: list[tuple[int, int]] = poll(0)
            if events or client.answered():
                return events or [(self._wake_fd, 0)]
            asked_at = clock()
            os.sched_yield()
            now = clock()
            if now - asked_at > CONTENDED_NS and client.in_flight > SPIN_ALWAYS:
                self._contended = CONTENDED_TURNS  # somebody else ran: the core is needed, so sleep for some turns
                return None
        return None

    def _sleep(self, plane: DataPlane) -> list[tuple[int, int]]:
        plane.bell.fall_asleep()
        news = plane.client.answered() and self._any_news()
        events: list[tuple[int, int]] = self._epoll.poll(0 if news else _TICK_S)
        plane.bell.wake_up()
        return events

    def _any_news(self) -> bool:
        """Whether an answered slot needs the loop: streams that are being pumped only do when they have chunks."""
        client = self._plane.client  # type: ignore[union-attr]
        return any(
            slot not in self._streams or client.state(slot) != SlotState.STREAMING or client.stream_waits(slot)
            for slot in client.answered()
        )

    def _listen_to_bell(self) -> None:
        """The tiny thread: waits on the segment's semaphore and wakes the loop."""
        plane = self._plane
        while plane is not None:
            plane.bell.sleep(1.0)
            os.eventfd_write(self._wake_fd, 1)

    def _tick(self) -> None:
        self._next_tick = self._now_ns + int(_TICK_S * 1e9)
        self.notify()
        if self.ppid != os.getppid():
            log.info("The gunicorn arbiter has gone; this web worker leaves.")
            self.alive = False
        now = time.monotonic()
        for connection in [c for c in self._connections.values() if c.limit_at and now > c.limit_at]:
            self._give_up(connection)

    def _drain(self) -> None:
        """Stops accepting once the backlog is taken; answers what is under way, with 503 what is not done in time."""
        for fd, number in self._listeners.items():
            while self._accept(fd):
                pass
            self._epoll.unregister(fd)
            self.sockets[number].close()
        now = time.monotonic()
        stop_at, silent_until = now + self._settings.config.graceful_timeout, now + SILENT_AT_STOP_S
        while self._connections and time.monotonic() < stop_at:
            for connection in list(self._connections.values()):
                silent = connection.phase == Phase.HEAD and not connection.buffer
                if silent and (connection.answered_ns or time.monotonic() > silent_until):
                    self._close(connection)
            self._turn()
        for connection in list(self._connections.values()):
            if connection.phase == Phase.ANSWER and connection.target is not None:
                self._waiting[connection.slot] = None
                connection.slot = -1
                self._answer_now(connection, Ticket(ServiceUnavailable("The server is stopping.")))

    # -- connections

    def _accept(self, fd: int) -> bool:
        listener = self._listeners[fd]
        for _ in range(ACCEPTS_PER_TURN):
            if len(self._connections) >= MAX_CONNECTIONS:
                return False
            try:
                sock, address = self.sockets[listener].accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    log.warning("Cannot accept a connection: %s", error)
                    time.sleep(0.05)  # out of descriptors: do not spin on the listener
                return False
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = f"/{address[0]}:{address[1]}" if isinstance(address, tuple) and address else "/unix"
            connection = Connection(sock, peer, listener)
            connection.limit_at = time.monotonic() + HEAD_LIMIT_S
            connection.events = _READ
            self._connections[connection.fd] = connection
            self._epoll.register(connection.fd, _READ)
        return True

    def _on_event(self, connection: Connection, event: int) -> None:
        try:
            if event & _GONE:
                self._client_gone(connection)
            elif event & select.EPOLLOUT:
                self._continue_sending(connection)
            elif connection.phase == Phase.BODY and connection.body_room is not None:
                self._receive_direct(connection)
            else:
                self._receive(connection)
        except ConnectionError:
            self._client_gone(connection)

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.events != events:
            connection.events = events
            self._epoll.modify(connection.fd, events)

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
        self._watch(connection, connection.events & ~_READ)
        connection.close_after = True
        if connection.phase == Phase.ANSWER and connection.head is not None and connection.head.http_1_1:
            # An interim answer changes nothing for a client that still reads (RFC 9110 15.2), and makes the kernel of
            # one that has closed say so at once.
            connection.sock.send(_CONTINUE)

    def _client_gone(self, connection: Connection) -> None:
        slot = connection.slot
        if slot >= 0 and slot in self._waiting and self._waiting[slot] is connection:
            client = self._plane.client  # type: ignore[union-attr]
            self._waiting[slot] = None
            self._streams.discard(slot)
            client.cancel(slot)
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

    def _give_up(self, connection: Connection) -> None:
        """A limit has passed: says so where the client is owed an answer, else just closes."""
        started = connection.phase == Phase.HEAD and connection.buffer
        if started or connection.phase == Phase.BODY:
            self._refuse(connection, BadHead(408, "The request did not arrive in time."))
        elif connection.phase in (Phase.ANSWER, Phase.STREAM):
            connection.limit_at = 0.0
        else:
            self._client_gone(connection)

    # -- phase 1: from bytes to a submitted slot

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
        if len(buffer) > MAX_HEAD:
            self._refuse(connection, BadHead(431, "The request's headers are too large."))
        elif b"\n\n" in buffer or buffer[:1].isspace() or b"\0" in buffer:
            self._refuse(connection, BadHead(400, "Invalid HTTP message."))
        elif connection.limit_at > time.monotonic() + HEAD_LIMIT_S:
            connection.limit_at = time.monotonic() + HEAD_LIMIT_S

    def _begin(self, connection: Connection, head: Head) -> None:
        connection.head = head
        connection.arrival_ns = self._now_ns
        connection.request_id = self._ids.new()
        connection.close_after = not head.keep_alive or connection.half_closed or not self.alive
        plane = self._plane
        if head.content_length > self._limit:
            self._too_large(connection)
            return
        target = plane.routes.target_of(head) if plane is not None else None
        connection.target = target
        if target is None:
            self._begin_plain(connection, head)
        elif target.error is not None:
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
                connection.limit_at = time.monotonic() + BODY_LIMIT_S
                return
            if not count:
                self._end_of_stream(connection)
                return
            connection.body_have += count
        connection.body_room = None
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
        try:
            plane.client.submit(
                slot,
                target.model,
                target.batchers[0] if len(target.batchers) == 1 else plane.choose(target),
                connection.request_id.encode(),
                head.raw,
                target.url_path,
                head.content_type,
                body,
                length,
                target.flags,
                connection.arrival_ns,
                connection.idle_us,
            )
        except SharedMemoryFull as full:
            self._no_memory(connection, full)
            return
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        self._waiting[slot] = connection
        if connection.half_closed:
            self._watch(connection, connection.events & ~_READ)

    def _no_memory(self, connection: Connection, full: SharedMemoryFull) -> None:
        log.error("%s", full.strerror)
        self._abandon_slot(connection)
        self._answer_now(connection, Ticket(OutOfResources("Not enough shared memory for the request")))

    # -- requests that are not predictions

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

    def _call_app(self, connection: Connection, body: bytes) -> None:
        environ = self._environ(connection)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["wsgi_ts.plane"] = self._plane
        app = self._apps[connection.listener]
        if not self._blocking[connection.listener]:
            self._respond(connection, _call(app, environ))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="management")
        connection.phase = Phase.ANSWER
        connection.limit_at = 0.0
        self._pool.submit(self._call_in_pool, connection, app, environ)

    def _call_in_pool(self, connection: Connection, app: WSGIApp, environ: dict[str, Any]) -> None:
        self._finished_calls.append((connection, _call(app, environ)))
        os.eventfd_write(self._wake_fd, 1)

    def _environ(self, connection: Connection) -> dict[str, Any]:
        environ = self._base_environs[connection.listener].copy()
        if connection.head is not None:
            environ.update(connection.head.environ)
        environ["wsgi_ts.request_id"] = connection.request_id
        environ["REMOTE_ADDR"] = connection.peer
        return environ

    # -- phase 2: from a finished slot to bytes on the wire

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
                self._read_requests(connection)

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
        try:
            self._respond(connection, self._app_response(connection, ticket))
        except ConnectionError:
            self._client_gone(connection)

    def _app_response(self, connection: Connection, ticket: Ticket) -> _Response:
        environ = self._environ(connection)
        environ["wsgi_ts.ticket"] = ticket
        return _call(self._apps[connection.listener], environ)

    def _respond(self, connection: Connection, response: _Response) -> None:
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
        elif connection.send_now(lines + body):
            self._sent(connection)
            return
        self._send(connection)

    def _head_lines(self, connection: Connection, response: _Response) -> bytes:
        fields = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
        last = "close" if connection.close_after else "keep-alive"
        return f"HTTP/1.1 {response.status}\r\n{fields}connection: {last}\r\n\r\n".encode("latin-1")

    def _send(self, connection: Connection) -> None:
        """Sends what is queued; when all is gone, the connection is ready for its next request."""
        if not connection.send_queued():
            connection.phase = Phase.SEND
            connection.limit_at = time.monotonic() + SEND_LIMIT_S
            self._watch(connection, select.EPOLLOUT)
            return
        self._sent(connection)

    def _sent(self, connection: Connection) -> None:
        self._release_sent(connection)
        if connection.close_after:
            self._linger(connection)
            return
        connection.answered_ns = self._now_ns
        connection.next_request()
        connection.limit_at = self._now_ns / 1e9 + IDLE_LIMIT_S
        if connection.events != _READ:
            self._watch(connection, _READ)

    def _continue_sending(self, connection: Connection) -> None:
        if connection.phase == Phase.STREAM:
            if connection.send_queued():
                self._watch(connection, _READ if not connection.half_closed else 0)
            return
        self._send(connection)
        self._read_requests(connection)

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
        self._watch(connection, _READ)

    def _ignorable(self, connection: Connection) -> int:
        """How many bytes a lingering client may still send: many clients read the answer only when all is sent."""
        length = connection.head.content_length if connection.head is not None else 0
        return LINGER_BYTES + (length if length <= self._limit else 0)

    # -- streamed answers

    def _start_stream(self, connection: Connection, response: _Response) -> None:
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
        for chunk in client.read_stream(slot):
            if chunk:
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
            if connection.stream_chunked:
                connection.queue(b"0\r\n\r\n")
        try:
            if state != SlotState.STREAMING:
                self._send(connection)
                self._read_requests(connection)
            elif not connection.send_queued():
                if connection.unsent > MAX_UNSENT_STREAM:
                    self._client_gone(connection)
                else:
                    self._watch(connection, select.EPOLLOUT)
        except ConnectionError:
            self._client_gone(connection)

    # -- errors of the HTTP layer, log and counters

    def _refuse(self, connection: Connection, bad: BadHead) -> None:
        """Answers what is not a request, or not one that arrives; the connection ends."""
        self._abandon_slot(connection)
        connection.request_id = self._ids.new()
        connection.close_after = True
        connection.arrival_ns = connection.arrival_ns or self._now_ns
        error = ServerError(bad.message, status=bad.status, type_name="BadRequestException")
        environ = self._environ(connection)
        environ.update(
            {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": "/",
                "QUERY_STRING": "",
                "SERVER_PROTOCOL": "HTTP/1.1",
                "wsgi_ts.error": error,
            }
        )
        self._respond(connection, _call(self._apps[connection.listener], environ))

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
        plane = self._plane
        if plane is None:
            return
        for place, word in enumerate((WebWord.RESPONSES_2XX, WebWord.RESPONSES_4XX, WebWord.RESPONSES_5XX)):
            count = self._counts[place]
            if count:
                plane.board.words[plane.web_row + word] += count
                self._counts[place] = 0


_NO_INPUT = io.BytesIO(b"")


class _Response:
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


def _call(app: WSGIApp, environ: dict[str, Any]) -> _Response:
    """Calls the app and gathers its answer; a single body part is not copied."""
    response = _Response()
    parts = app(environ, response.start)
    if type(parts) is list and len(parts) == 1:
        response.body = parts[0]
        return response
    response.body = b"".join(parts)
    close = getattr(parts, "close", None)
    if close is not None:
        close()
    return response


def _base_environ(sock: socket.socket) -> dict[str, Any]:
    """The WSGI variables that are the same for all requests of a listener."""
    name = sock.getsockname()
    server, port = (str(name[0]), str(name[1])) if isinstance(name, tuple) else (str(name), "")
    return {
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": _NO_INPUT,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "SCRIPT_NAME": "",
        "SERVER_NAME": server,
        "SERVER_PORT": port,
    }


def _empty(fd: int) -> None:
    """Reads a wake-up descriptor empty."""
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)
