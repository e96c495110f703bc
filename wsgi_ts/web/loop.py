"""The loop of a web worker: one epoll, no thread, greenlet or coroutine for a request.

A request in flight is a row in a table. Everything that can be done once per turn is: publishing to the batchers, the
scan for answers, the access log. A tiny thread waits on the segment's doorbell and wakes the loop.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.dataplane.server_load import ServerLoad
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.plugins.auth import Decision
from wsgi_ts.security.access import Access
from wsgi_ts.security.tls import PlainHttp, accept_tls
from wsgi_ts.web.answers import SPIN_IN_FLIGHT, SPIN_LIMIT_NS, Answers
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.gate import GatedAccess
from wsgi_ts.web.listeners import Endpoint, Listeners
from wsgi_ts.web.load_header import LoadHeader
from wsgi_ts.web.report import Report
from wsgi_ts.web.requests import HEAD_LIMIT_S, Requests
from wsgi_ts.web.sending import Sender
from wsgi_ts.web.table import ConnectionTable
from wsgi_ts.web.viewers import Viewers

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

#: At a stop, how long a connection on which nothing is under way may take to send its next request.
SILENT_AT_STOP_S = 1.0
#: For the handshake of a TLS connection and its first request to begin.
HANDSHAKE_LIMIT_S = 8.0
GC_THRESHOLD = 50_000
_TICK_S = 1.0
_GONE = select.EPOLLHUP | select.EPOLLERR


class WebLoop:
    """The event loop: waits for events, and has each attended to.

    Args:
        signal_fd: becomes readable when a signal has arrived.
        on_tick: called about once a second; False means that it is time to stop.
    """

    def __init__(
        self,
        instance: Instance,
        endpoints: Sequence[Endpoint],
        exchange: Exchange[Connection] | None,
        signal_fd: int,
        on_tick: Callable[[], bool],
        make_report: Callable[[LineLog, Board, int, int], Report] = Report,
    ) -> None:
        config = instance.config
        self._graceful_timeout_s = config.graceful_timeout
        self._silent_until = 0.0
        self._exchange = exchange
        self._on_tick = on_tick
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        board = exchange.board if exchange is not None else Board.attach(instance.prefix)
        row = exchange.web_row if exchange is not None else board.control_web_row
        http_row = exchange.http_row if exchange is not None else board.control_http_row
        table = self.table = ConnectionTable(exchange, config.max_request_size)
        self.report = make_report(instance.log_files.access, board, row, http_row)
        if exchange is not None:
            self.report.traces = exchange.traces
            if exchange.traces is not None:
                exchange.traces.gather()
            self.report.segment = exchange.client.segment
        table.left = self.report.left
        self.report.is_json = config.log_format == "json"
        load = None
        if exchange is not None and config.endpoint_load_metrics:
            load = LoadHeader(ServerLoad(board, exchange.routes))
        self.sender = Sender(table)
        self.answers = Answers(table, self.sender, exchange, self.report, load, tells_times=config.server_timing)
        preflights = bool(config.cors_allowed_origin)
        most = config.max_request_size
        self.requests = Requests(table, self.answers, exchange, most, self._wake, answers_preflights=preflights)
        self._viewers: Viewers | None = None
        if config.console and any("management" in endpoint.kinds for endpoint in endpoints):
            self._viewers = Viewers(ControlPlane(instance.run_dir), self.answers, self._wake)
        self._accesses: list[Access] = []
        for endpoint in endpoints:
            if Access.is_limited(endpoint.kinds, config):
                access = endpoint.access = Access(endpoint.kinds, config, instance.run_dir, board)
                ours = [path for path, plugin in endpoint.plugins.items() if plugin.found.type == "inference"]
                access.inference_roots = frozenset(ours)
                access.plugin_roots = frozenset(endpoint.plugins)
                self._accesses.append(access)
            if endpoint.gate is not None:
                tokens = endpoint.access if isinstance(endpoint.access, Access) else None
                endpoint.access = GatedAccess(tokens, endpoint.gate, endpoint.kinds, endpoint.plugins)
        self._events: list[tuple[int, int]] = []
        self._listeners = Listeners(endpoints, table.epoll)
        self._own_fds = {self._wake_fd, signal_fd}
        for fd in self._own_fds:
            table.epoll.register(fd, select.EPOLLIN)
        if exchange is not None:
            exchange.listen(self._wake, always=False)
        # What is there now stays; requests make few cycles, so the collector need not look after every 700 objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)

    def run(self, alive: Callable[[], bool]) -> None:
        """Serves while `alive()`, then answers what was accepted (at most `graceful_timeout` seconds)."""
        try:
            while alive() and not self.requests.is_stopping:
                self.turn()
            self.drain()
        finally:
            self.report.close()

    def turn(self) -> None:
        """Waits for something to do, and does all of it."""
        exchange, table = self._exchange, self.table
        events = self._wait()
        table.now_ns = time.monotonic_ns()
        self._refresh()
        to_accept = []
        for fd, event in events:
            connection = table.connections.get(fd)
            if connection is not None:
                try:
                    self._on_event(connection, event)
                except Exception as error:
                    self._end(connection, error)
            elif fd in self._own_fds:
                _empty(fd)
            else:
                to_accept.append(fd)
        # Last: a new connection may get the descriptor of one that was closed, and must not get its events, too.
        for fd in to_accept:
            self._accept(fd)
        if exchange is not None:
            exchange.client.publish()
            if exchange.client.in_flight:
                self.answers.collect()
        self.go_on()
        if exchange is not None:
            exchange.client.publish()
        self.report.flush()
        if table.has_closed:
            table.has_closed = False
            self._listeners.resume()
        if table.now_ns >= table.look_at_ns:
            self._tick()

    def _wait(self) -> list[tuple[int, int]]:
        """Waits for events, for answers, or for the next tick.

        Being woken costs two context switches (doorbell thread, loop). Where few requests are under way and answers
        come within a millisecond, looking is cheaper, and faster for the client; others that want the core get it.
        """
        exchange, table = self._exchange, self.table
        until_tick_s = 0.0 if table.unread else max(0.0, (table.look_at_ns - time.monotonic_ns()) / 1e9)
        if table.unread or exchange is None or not exchange.client.in_flight:
            return table.epoll.poll(until_tick_s)
        quick_ns = self.answers.quick_ns
        is_quick = exchange.client.in_flight <= SPIN_IN_FLIGHT and quick_ns <= SPIN_LIMIT_NS
        self._events = []
        exchange.bell.wait(
            self._has_news, until_tick_s, spin_ns=2 * quick_ns if is_quick else 0, sleep=self._wait_for_events
        )
        return self._events

    def _has_news(self) -> bool:
        self._events = self._events or self.table.epoll.poll(0)
        return bool(self._events or self._exchange.client.answered())  # type: ignore[union-attr]

    def _wait_for_events(self, seconds: float) -> bool:
        self._events = self.table.epoll.poll(seconds)
        return bool(self._events)

    def _refresh(self) -> None:
        """Takes in what the supervisor has published since the last turn: routes, and keys."""
        if self._exchange is not None:
            self._exchange.routes.refresh()
            if self._exchange.routes.draining:
                self._leave()
        for access in self._accesses:
            access.refresh(self.table.now_ns)

    def go_on(self) -> None:
        """Sends the answers of threads, and reads data that epoll does not report."""
        table, requests = self.table, self.requests
        while (call := requests.calls.take()) is not None:
            self._attend(call[0], self._send_called, call[1])
        if self._viewers is not None:
            self._viewers.send()
        while table.ready:
            self._attend(table.ready.pop(), requests.read)
        unread, table.unread = table.unread, []
        for connection in unread:
            self._attend(connection, requests.receive_direct)

    def _attend(self, connection: Connection, action: Callable[..., None], *arguments: Any) -> None:
        """Runs an action for one connection; a failure ends the request of this connection only."""
        if connection.closed:
            return
        try:
            action(connection, *arguments)
        except Exception as error:
            self._end(connection, error)

    def _end(self, connection: Connection, error: Exception) -> None:
        """Ends the request or connection that raised an exception; to be called in the `except` block."""
        if isinstance(error, PlainHttp):
            self.answers.refuse_plain(connection)
        elif isinstance(error, OSError):
            self.table.client_gone(connection)
        else:
            self.answers.fail(connection)

    def _on_event(self, connection: Connection, event: int) -> None:
        if event & _GONE:
            self.table.client_gone(connection)
        elif event & select.EPOLLOUT:
            self.sender.continue_sending(connection)
        else:
            self.requests.receive(connection)

    def _send_called(self, connection: Connection, result: Any) -> None:
        if isinstance(result, Exception):
            raise result
        if isinstance(result, Decision):
            self.requests.decided(connection, result)
        elif self._viewers is not None and self._viewers.wants(connection, result):
            self._viewers.add(connection, result)
        else:
            self.answers.respond(connection, result)

    def _wake(self) -> None:
        """Ends the loop's sleep; on any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def _tick(self) -> None:
        self.table.look_at_ns = self.table.now_ns + int(_TICK_S * 1e9)
        if not self._on_tick():
            self.requests.is_stopping = True
        self._listeners.resume()
        self.report.look(self.table.now_ns)
        now = time.monotonic()
        for connection in [c for c in self.table.connections.values() if c.limit_at]:
            if now > connection.limit_at:
                self._attend(connection, self.requests.give_up)
            elif connection.phase == Phase.ANSWER or connection.sends_events:
                self.table.limit_answer(connection, int(connection.limit_at * 1e9))

    def _leave(self) -> None:
        """From now on every connection ends with its next answer."""
        if not self.requests.is_leaving:
            self.requests.is_leaving = True
            self._silent_until = time.monotonic() + SILENT_AT_STOP_S

    def drain(self) -> None:
        """Stops accepting once the backlog is taken; answers what is under way, with 503 what is not done in time.

        A client that keeps its connection learns only with an answer, or when the connection is closed, that it is to
        take another one: a request that it sends at that moment would be lost. So connections that are silent stay for
        a moment, in which those in use are answered for the last time.
        """
        table = self.table
        self.requests.is_stopping = True
        self._leave()
        for fd in self._listeners.by_fd:
            while self._accept(fd):
                pass
        self._listeners.close()
        if self._viewers is not None:
            self._viewers.end_all()
        stop_at = time.monotonic() + self._graceful_timeout_s
        while table.connections and (now := time.monotonic()) < stop_at:
            if now < self._silent_until:
                table.look_at_ns = min(table.look_at_ns, int(self._silent_until * 1e9))
            else:
                self._close_silent()
            if table.connections:
                self.turn()
        for connection in list(table.connections.values()):
            if connection.phase == Phase.ANSWER and connection.target is not None:
                table.forget_slot(connection)
                self._attend(connection, self.answers.answer, ServiceUnavailable("The server is stopping."))

    def _close_silent(self) -> None:
        """Closes the connections on which nothing is under way."""
        for connection in list(self.table.connections.values()):
            is_silent = connection.phase == Phase.HEAD and not connection.buffer
            # What came while the last turn was under way is a request that was sent before the end.
            if is_silent and not _has_unread(connection.sock):
                self.table.close(connection)

    def _accept(self, fd: int) -> bool:
        """Takes new connections from a listening socket; False when none was waiting."""
        endpoint = self._listeners.by_fd.get(fd)
        if endpoint is None:
            return False
        before = len(self.table.connections)
        for sock, peer in self._listeners.accept(endpoint, before):
            self.welcome(sock, peer, endpoint)
        return len(self.table.connections) > before

    def welcome(self, sock: socket.socket, peer: str, endpoint: Endpoint) -> None:
        """Takes a new connection into the table."""
        limit_s = HEAD_LIMIT_S
        if endpoint.context is not None:
            try:
                sock, limit_s = accept_tls(endpoint.context, sock), HANDSHAKE_LIMIT_S
            except (OSError, PlainHttp):  # gone again already
                sock.close()
                return
        self.table.add(Connection(sock, peer, endpoint), limit_s)


def _has_unread(sock: socket.socket) -> bool:
    """Returns whether a client has sent something that was not received yet."""
    try:
        # Not the socket's own method: TLS decrypts, and cannot look without taking.
        return bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))
    except OSError:  # nothing there (BlockingIOError), or the client has gone
        return False


def _empty(fd: int) -> None:
    """Reads a wake-up descriptor empty."""
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)
