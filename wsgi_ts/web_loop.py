"""The loop of a web worker: one epoll, no thread, greenlet or coroutine for a request.

A request in flight is a row in a table. Everything that can be done once per turn is: publishing to the batchers, the
scan for answers, the access log. A tiny thread waits on the segment's doorbell and wakes the loop.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from wsgi_ts.batcher.layout import SlotState
from wsgi_ts.connection import Connection, Phase
from wsgi_ts.dataplane import DataPlane, Ticket
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.tls import PlainHttp, accept_tls
from wsgi_ts.web_answers import READ_EVENTS, SPIN_IN_FLIGHT, SPIN_LIMIT_NS, WSGIApp
from wsgi_ts.web_requests import HEAD_LIMIT_S, RequestSide

if TYPE_CHECKING:
    from wsgi_ts.rest.apps import WebSettings

log = logging.getLogger(__name__)

#: At a stop, how long a connection that has sent nothing yet may take to send its request.
SILENT_AT_STOP_S = 1.0
#: For the handshake of a TLS connection and its first request to begin.
HANDSHAKE_LIMIT_S = 8.0
#: At most so many connections a turn, so that the web workers share a burst of them.
ACCEPTS_PER_TURN = 16
MAX_CONNECTIONS = 10000
GC_THRESHOLD = 50_000
_TICK_S = 1.0
_GONE = select.EPOLLHUP | select.EPOLLERR


class WebLoop(RequestSide):
    """The loop and the connections it serves.

    Args:
        settings, apps, plane, contexts, kinds: see `RequestSide`.
        sockets: the listening sockets.
        signal_fd: becomes readable when a signal has arrived.
        on_tick: called about once a second; False means that it is time to stop.
    """

    def __init__(
        self,
        settings: WebSettings,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
        kinds: list[tuple[str, ...]],
        signal_fd: int,
        on_tick: Callable[[], bool],
    ) -> None:
        super().__init__(settings, apps, sockets, plane, contexts, kinds)
        self._sockets = sockets
        self._contexts = contexts
        self._on_tick = on_tick
        self._listeners = {sock.fileno(): number for number, sock in enumerate(sockets)}
        self._own_fds = {self._wake_fd, signal_fd}
        for sock in sockets:
            sock.setblocking(False)
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)
        for fd in self._own_fds:
            self._epoll.register(fd, select.EPOLLIN)
        if plane is not None:
            threading.Thread(target=self._listen_to_bell, args=(plane,), name="doorbell", daemon=True).start()
        # What is there now stays; requests make few cycles, so the collector need not look after every 700 objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def run(self, alive: Callable[[], bool]) -> None:
        """Serves while `alive()`, then answers what was accepted (at most `graceful_timeout` seconds)."""
        try:
            while alive() and not self._stopping:
                self._turn()
            self._drain()
        finally:
            self._access.flush()

    def _turn(self) -> None:
        plane = self._plane
        if plane is None or not plane.client.in_flight:
            events = self._epoll.poll(self._until_tick())
        else:
            events = self._spin(plane) or self._sleep(plane)
        self._now_ns = time.monotonic_ns()
        self._refresh()
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
        self._go_on()
        if plane is not None:
            plane.client.publish()
        self._access.flush()
        self._flush_counts()
        if self._now_ns >= self._next_tick:
            self._tick()

    def _refresh(self) -> None:
        """Takes in what the supervisor has published since the last turn: routes, and keys."""
        if self._plane is not None:
            self._plane.routes.refresh()
        for gate in self._gates:
            if gate is not None:
                gate.refresh(self._now_ns)

    def _go_on(self) -> None:
        """Sends what the pool's threads have answered, and reads requests that came behind an answered one."""
        while self._finished_calls:
            connection, response = self._finished_calls.popleft()
            if self._connections.get(connection.fd) is connection:
                self._respond(connection, response)
        while self._ready:
            connection = self._ready.pop()
            try:
                self._read_requests(connection)
            except OSError:
                self._client_gone(connection)

    def _spin(self, plane: DataPlane) -> list[tuple[int, int]] | None:
        """Looks for events and answers for a moment instead of sleeping; None when it is better to sleep.

        Being woken costs two context switches (doorbell thread, loop). Where few requests are under way and answers
        come within a millisecond, looking is cheaper, and faster for the client; others that want the core get it.
        """
        client = plane.client
        if client.in_flight > SPIN_IN_FLIGHT or self._quick_ns > SPIN_LIMIT_NS:
            return None
        poll, clock = self._epoll.poll, time.monotonic_ns
        stop_at = clock() + 2 * self._quick_ns
        while clock() < stop_at:
            events: list[tuple[int, int]] = poll(0)
            if events or client.answered():
                return events or [(self._wake_fd, 0)]
            os.sched_yield()
        return None

    def _sleep(self, plane: DataPlane) -> list[tuple[int, int]]:
        plane.bell.fall_asleep()
        news = plane.client.answered() and self._any_news()
        events: list[tuple[int, int]] = self._epoll.poll(0 if news else self._until_tick())
        plane.bell.wake_up()
        return events

    def _until_tick(self) -> float:
        """Seconds to the next tick."""
        return max(0.0, (self._next_tick - time.monotonic_ns()) / 1e9)

    def _any_news(self) -> bool:
        """Whether an answered slot needs the loop: streams that are being pumped only do when they have chunks."""
        client = self._plane.client  # type: ignore[union-attr]
        return any(
            slot not in self._streams or client.state(slot) != SlotState.STREAMING or client.stream_waits(slot)
            for slot in client.answered()
        )

    def _listen_to_bell(self, plane: DataPlane) -> None:
        """The tiny thread: waits on the segment's semaphore and wakes the loop."""
        while True:
            plane.bell.sleep(1.0)
            os.eventfd_write(self._wake_fd, 1)

    def _tick(self) -> None:
        self._next_tick = self._now_ns + int(_TICK_S * 1e9)
        if not self._on_tick():
            self._stopping = True
        now = time.monotonic()
        for connection in [c for c in self._connections.values() if c.limit_at]:
            if now > connection.limit_at:
                self._give_up(connection)
            elif connection.phase == Phase.ANSWER:
                self._limit_answer(connection, int(connection.limit_at * 1e9))

    def _drain(self) -> None:
        """Stops accepting once the backlog is taken; answers what is under way, with 503 what is not done in time."""
        self._stopping = True
        for fd, number in self._listeners.items():
            while self._accept(fd):
                pass
            self._epoll.unregister(fd)
            self._sockets[number].close()
        now = time.monotonic()
        stop_at, silent_until = now + self._settings.config.graceful_timeout, now + SILENT_AT_STOP_S
        while self._connections and time.monotonic() < stop_at:
            for connection in list(self._connections.values()):
                silent = connection.phase == Phase.HEAD and not connection.buffer
                may_go = silent and (connection.answered_ns or time.monotonic() > silent_until)
                # What came while the last turn was under way is a request that was sent before the stop.
                if may_go and not _has_unread(connection.sock):
                    self._close(connection)
            self._turn()
        for connection in list(self._connections.values()):
            if connection.phase == Phase.ANSWER and connection.target is not None:
                self._waiting[connection.slot] = None
                connection.slot = -1
                self._answer_now(connection, Ticket(ServiceUnavailable("The server is stopping.")))

    def _accept(self, fd: int) -> bool:
        listener = self._listeners[fd]
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = self._sockets[listener].accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.ECONNABORTED, errno.EINTR):
                    log.warning("Cannot accept a connection: %s", error)
                    time.sleep(0.05)  # out of descriptors: do not spin on the listener
                return False
            if len(self._connections) >= MAX_CONNECTIONS:
                sock.close()
                continue
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = f"/{address[0]}:{address[1]}" if isinstance(address, tuple) and address else "/unix"
            context, limit_s = self._contexts[listener], HEAD_LIMIT_S
            if context is not None:
                try:
                    sock, limit_s = accept_tls(context, sock), HANDSHAKE_LIMIT_S
                except (OSError, PlainHttp):  # gone again already
                    sock.close()
                    continue
            connection = Connection(sock, peer, listener)
            connection.limit_at = time.monotonic() + limit_s
            connection.events = READ_EVENTS
            self._connections[connection.fd] = connection
            self._epoll.register(connection.fd, READ_EVENTS)
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
        except PlainHttp:
            self._refuse_plain(connection)
        except OSError:
            self._client_gone(connection)


def _has_unread(sock: socket.socket) -> bool:
    """Whether a client has sent something that was not received yet."""
    try:
        # Not the socket's own method: TLS decrypts, and cannot look without taking.
        return bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))
    except OSError:  # nothing there (BlockingIOError), or the client has gone
        return False


def _empty(fd: int) -> None:
    """Reads a wake-up descriptor empty."""
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)
