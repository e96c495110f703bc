"""The loop of a web worker: one epoll, no thread, greenlet or coroutine for a request.

A request in flight is a row in a table. Everything that can be done once per turn is: publishing to the batchers, the
scan for answers, the access log. A tiny thread waits on the segment's doorbell and wakes the loop.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wsgi_ts.dataplane.plane import DataPlane, Ticket
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.security.tls import PlainHttp, accept_tls
from wsgi_ts.web.answers import SPIN_IN_FLIGHT, SPIN_LIMIT_NS
from wsgi_ts.web.app import AppResponse, WSGIApp
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.listeners import Listeners
from wsgi_ts.web.requests import HEAD_LIMIT_S, RequestSide
from wsgi_ts.web.table import READ_EVENTS

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: At a stop, how long a connection that has sent nothing yet may take to send its request.
SILENT_AT_STOP_S = 1.0
#: For the handshake of a TLS connection and its first request to begin.
HANDSHAKE_LIMIT_S = 8.0
GC_THRESHOLD = 50_000
_TICK_S = 1.0
_GONE = select.EPOLLHUP | select.EPOLLERR


class WebLoop(RequestSide):
    """The loop and the connections it serves.

    Args:
        instance, apps, plane, contexts, kinds: see `RequestSide`.
        sockets: the listening sockets.
        signal_fd: becomes readable when a signal has arrived.
        on_tick: called about once a second; False means that it is time to stop.
    """

    def __init__(
        self,
        instance: Instance,
        apps: list[WSGIApp],
        sockets: list[socket.socket],
        plane: DataPlane | None,
        contexts: list[ssl.SSLContext | None],
        kinds: list[tuple[str, ...]],
        signal_fd: int,
        on_tick: Callable[[], bool],
    ) -> None:
        super().__init__(instance, apps, sockets, plane, contexts, kinds)
        self._contexts = contexts
        self._on_tick = on_tick
        self._listeners = Listeners(sockets, self._epoll)
        self._own_fds = {self._wake_fd, signal_fd}
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
        events = self._wait()
        self._now_ns = time.monotonic_ns()
        self._refresh()
        to_accept = []
        for fd, event in events:
            connection = self._connections.get(fd)
            if connection is not None:
                self._on_event(connection, event)
            elif fd in self._own_fds:
                _empty(fd)
            else:
                to_accept.append(fd)
        # Last: a new connection may get the descriptor of one that was closed, and must not get its events, too.
        for fd in to_accept:
            self._accept(fd)
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

    def _wait(self) -> list[tuple[int, int]]:
        """Waits for events, for answers, or for the next tick."""
        plane = self._plane
        if self._unread or plane is None or not plane.client.in_flight:
            return self._epoll.poll(self._until_tick())
        return self._spin(plane) or self._sleep(plane)

    def _refresh(self) -> None:
        """Takes in what the supervisor has published since the last turn: routes, and keys."""
        if self._plane is not None:
            self._plane.routes.refresh()
        for gate in self._gates:
            if gate is not None:
                gate.refresh(self._now_ns)

    def _go_on(self) -> None:
        """Sends what threads have answered, and reads what lies there without epoll's telling of it."""
        while (call := self._calls.take()) is not None:
            self._attend(call[0], self._send_called, call[1])
        while self._ready:
            self._attend(self._ready.pop(), self._read_requests)
        unread, self._unread = self._unread, []
        for connection in unread:
            self._attend(connection, self._receive_direct)

    def _attend(self, connection: Connection, action: Callable[..., None], *arguments: Any) -> None:
        """Does something for one connection; whatever goes wrong costs its request and no other."""
        if connection.closed:
            return
        try:
            action(connection, *arguments)
        except PlainHttp:
            self._refuse_plain(connection)
        except OSError:
            self._client_gone(connection)
        except Exception:
            self._request_failed(connection)

    def _send_called(self, connection: Connection, result: AppResponse | Exception) -> None:
        if isinstance(result, Exception):
            raise result
        self._respond(connection, result)

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
        events: list[tuple[int, int]] = self._epoll.poll(0 if plane.client.answered() else self._until_tick())
        plane.bell.wake_up()
        return events

    def _until_tick(self) -> float:
        """Seconds to the next tick; none where there is something to do."""
        return 0.0 if self._unread else max(0.0, (self._next_tick - time.monotonic_ns()) / 1e9)

    def _listen_to_bell(self, plane: DataPlane) -> None:
        """The tiny thread: waits on the segment's semaphore and wakes the loop."""
        while True:
            plane.bell.sleep(1.0)
            os.eventfd_write(self._wake_fd, 1)

    def _tick(self) -> None:
        self._next_tick = self._now_ns + int(_TICK_S * 1e9)
        if not self._on_tick():
            self._stopping = True
        self._listeners.resume()
        now = time.monotonic()
        for connection in [c for c in self._connections.values() if c.limit_at]:
            if now > connection.limit_at:
                self._attend(connection, self._give_up)
            elif connection.phase == Phase.ANSWER:
                self._limit_answer(connection, int(connection.limit_at * 1e9))

    def _drain(self) -> None:
        """Stops accepting once the backlog is taken; answers what is under way, with 503 what is not done in time."""
        self._stopping = True
        for sock in self._listeners.sockets:
            while self._accept(sock.fileno()):
                pass
        self._listeners.close()
        now = time.monotonic()
        stop_at, silent_until = now + self._instance.config.graceful_timeout, now + SILENT_AT_STOP_S
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
                self._forget_slot(connection)
                self._attend(connection, self._answer_now, Ticket(ServiceUnavailable("The server is stopping.")))

    def _close(self, connection: Connection) -> None:
        super()._close(connection)
        if self._listeners.is_paused and not self._stopping:
            self._listeners.resume()

    def _accept(self, fd: int) -> bool:
        """Takes new connections from a listening socket; False when none was waiting."""
        number = self._listeners.number(fd)
        if number is None:
            return False
        before = len(self._connections)
        for sock, peer in self._listeners.accept(number, before):
            self._welcome(sock, peer, number)
        return len(self._connections) > before

    def _welcome(self, sock: socket.socket, peer: str, listener: int) -> None:
        context, limit_s = self._contexts[listener], HEAD_LIMIT_S
        if context is not None:
            try:
                sock, limit_s = accept_tls(context, sock), HANDSHAKE_LIMIT_S
            except (OSError, PlainHttp):  # gone again already
                sock.close()
                return
        connection = Connection(sock, peer, listener)
        connection.limit_at = time.monotonic() + limit_s
        connection.events = READ_EVENTS
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, READ_EVENTS)

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
        except Exception:
            self._request_failed(connection)


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
