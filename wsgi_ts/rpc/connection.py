"""A connection of a gRPC client: a socket of the event loop, HTTP/2 on it, calls on that."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from typing import Any, cast

from wsgi_ts.http2.connection import Connection
from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import LAST_STREAM
from wsgi_ts.http2.stream import Event, EventKind, Fields, Stream
from wsgi_ts.rpc import wire
from wsgi_ts.rpc.call import RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.port import Port
from wsgi_ts.rpc.status import StatusCode

log = logging.getLogger(__name__)

#: The client must say that it speaks HTTP/2 within so many seconds.
_PREFACE_LIMIT_S = 20.0
#: So long a client has to hear that no further call is taken, where it does not answer a ping.
_GOAWAY_LIMIT_S = 1.0
#: What is sent at a stop, or at the end of a connection's age, may take so long to leave.
_CLOSE_LIMIT_S = 1.0
#: A connection's age ends within this part of it before or after, so that not all come back at once.
_AGE_JITTER = 0.1
#: A peer whose machine is gone is noticed: silence in seconds before it is asked, between two probes, and how many.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 300), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 4))
_UNSENT_BYTES = 256 << 10
_HTTP1_METHODS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"OPTIONS ", b"DELETE ")
_HTTP1_TEXT = b"This port speaks gRPC (HTTP/2). The REST APIs have ports of their own.\n"
_HTTP1_FIELDS = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n" % len(_HTTP1_TEXT)


class RpcConnection(asyncio.Protocol):
    """One connection.

    Attributes:
        http2: its state.
        peer: the client's address, `host:port`.
        certificate: what the client has shown, verified, as `ssl.SSLSocket.getpeercert` tells it; None where it has
            shown none.
        calls: those under way, by their streams' numbers.
    """

    def __init__(self, port: Port) -> None:
        self.http2 = Connection(port.most_calls)
        self.peer = ""
        self.certificate: dict[str, Any] | None = None
        self.calls: dict[int, RpcCall] = {}
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._must_flush = False
        self._timers: list[asyncio.TimerHandle] = []
        self._is_new = True
        self._last_fields: Fields | None = None
        self._last_head: wire.RequestHead | None = None

    # The event loop's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client is there."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        name = transport.get_extra_info("peername") or ("", 0)
        self.peer = f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
        self.certificate = transport.get_extra_info("peercert") or None
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if not self._port.welcome(self):
            self._transport.abort()
            return
        self._after(_PREFACE_LIMIT_S, self._give_up_silent)
        age = self._port.most_age_s
        if age is not None:
            self._after(age * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER), self._end_of_age)

    def data_received(self, data: bytes) -> None:
        """Takes what has come."""
        if self._is_new and data.startswith(_HTTP1_METHODS):
            self._refuse_http1()
            return
        self._is_new = False
        try:
            events = self.http2.receive(data)
        except ConnectionFault as fault:
            log.info("A client at %s has broken HTTP/2: %s", self.peer, fault.text)
            self._close()
            return
        except Exception:
            log.exception("Unexpected error in a connection of %s", self.peer)
            self._close()
            return
        for event in events:
            self._on_event(event)
        if self.http2.outbox.has_output:
            self.flush()

    def eof_received(self) -> bool | None:
        """The client sends nothing more, and a connection of gRPC has no half: it is over."""
        return None

    def pause_writing(self) -> None:
        """The socket takes nothing for the moment."""
        self.http2.outbox.is_blocked = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self.http2.outbox.is_blocked = False
        events: list[Event] = []
        self.http2.outbox.go_on(events)
        for event in events:
            self._on_event(event)
        self.flush_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over, whoever has ended it."""
        self._transport = None
        for timer in self._timers:
            timer.cancel()
        for call in list(self.calls.values()):
            call.stream.is_answered = True
            call.cancel()
            self.forget(call)
        self._port.left(self)

    # Calls

    def _on_event(self, event: Event) -> None:
        stream = event.stream
        if event.kind == EventKind.REQUEST:
            self._begin(stream, event.fields or [], event.ends)
            return
        call = self.calls.get(stream.number)
        if call is None:
            self.http2.taken(stream, len(event.data))
        elif event.kind == EventKind.DATA:
            self._receive(call, event.data, event.ends)
        elif event.kind == EventKind.RESET:
            call.cancel()
            self.forget(call)
        else:
            call.has_room()

    def _begin(self, stream: Stream, fields: Fields, ends: bool) -> None:
        try:
            head = self._head(fields)
            if head.refusal is not None:
                self._refuse(stream, *head.refusal)
                return
            method = self._port.methods.get(head.path)
            if method is None:
                raise Failure(StatusCode.UNIMPLEMENTED, "Method not found!")
            self._port.admit()
        except Failure as failure:
            self.http2.outbox.send_trailers(stream, wire.only_status(failure.code, failure.description))
            return
        call = self.calls[stream.number] = RpcCall(self, stream, head, method, self._port.most_message_bytes)
        self._port.calls_under_way += 1
        if head.timeout_s is not None:
            call.timer = self._loop.call_later(head.timeout_s, self._too_late, call)
        if method.takes_stream or ends:
            self._receive(call, b"", ends)

    def _head(self, fields: Fields) -> wire.RequestHead:
        """The meaning of a header block; the same block as last time means the same."""
        head = self._last_head
        if head is None or fields is not self._last_fields:
            head = wire.RequestHead(fields)
            self._last_fields, self._last_head = fields, head
        return head

    def _receive(self, call: RpcCall, data: bytes, ends: bool) -> None:
        try:
            call.receive(data, ends)
        except Failure as failure:
            call.end(failure.code, failure.description)
            call.cancel()
            return
        ledger, held = self._port.received, call.reader.held
        if held or call in ledger:
            ledger.note(call, held)
            while ledger.is_exceeded:
                largest = ledger.largest()
                largest.end(StatusCode.RESOURCE_EXHAUSTED, "Too many bytes of requests are being received.")
                largest.cancel()

    def _refuse(self, stream: Stream, status: int, text: str) -> None:
        self.http2.send_head(stream, wire.refusal_block(status))
        self.http2.outbox.send_data(stream, text.encode())
        # The end of what is no gRPC call has no status of gRPC's.
        self.http2.send_end(stream)

    def _too_late(self, call: RpcCall) -> None:
        call.timer = None
        call.end(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        call.cancel()

    def taken(self, call: RpcCall, length: int) -> None:
        """Lets the client send on, as so many bytes of a call's body were taken."""
        self.http2.taken(call.stream, length)
        if self.http2.outbox.has_output:
            self.flush_soon()

    def forget(self, call: RpcCall) -> None:
        """Nothing more is to be sent for a call."""
        if self.calls.pop(call.stream.number, None) is not None:
            self._port.calls_under_way -= 1
            if call in self._port.received:
                self._port.received.note(call, 0)

    # Sending

    def flush_soon(self) -> None:
        """Sends what there is to send at the end of the loop's turn: mostly answers of several calls in one."""
        if not self._must_flush:
            self._must_flush = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Sends what there is to send."""
        self._must_flush = False
        transport, http2 = self._transport, self.http2
        while transport is not None and http2.outbox.has_output and not http2.outbox.is_blocked:
            transport.write(http2.outbox.take())
        if transport is not None and http2.is_going and not http2.outbox.streams and not http2.outbox.has_output:
            transport.close()

    # The end

    def leave(self) -> None:
        """Takes no further call; the connection ends with the last one that it has."""
        if self._transport is None or self.http2.is_going:
            return
        # What the client has sent meanwhile is still taken: until it has answered, it does not know.
        self.http2.go_away(LAST_STREAM)
        self.http2.ping()
        self.flush()
        self._leave_when_heard(self.http2.pings_answered, self._loop.time() + _GOAWAY_LIMIT_S)

    def _leave_when_heard(self, pings: int, until: float) -> None:
        if self._transport is None:
            return
        if self.http2.pings_answered == pings and self._loop.time() < until:
            self._after(0.01, self._leave_when_heard, pings, until)
            return
        self.http2.go_away()
        self.flush()

    def end_calls(self) -> None:
        """Ends all calls and the connection."""
        for call in list(self.calls.values()):
            call.end(StatusCode.CANCELLED, "The server is stopping.")
            call.cancel()
        self.http2.go_away()
        self._close()

    def _end_of_age(self) -> None:
        self.leave()
        if self._port.age_grace_s is not None:
            self._after(self._port.age_grace_s, self._close)

    def _give_up_silent(self) -> None:
        if self._is_new:
            self._close()

    def _close(self) -> None:
        """Closes the connection once all that is to be sent has left, or after a moment."""
        transport = self._transport
        if transport is None:
            return
        if self.http2.outbox.has_output:
            transport.write(self.http2.outbox.take())
        transport.close()
        self._after(_CLOSE_LIMIT_S, transport.abort)

    def _refuse_http1(self) -> None:
        if self._transport is not None:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\n%b\r\n%b" % (_HTTP1_FIELDS, _HTTP1_TEXT))
            self._transport.close()

    def _after(self, seconds: float, action: Any, *arguments: Any) -> None:
        self._timers.append(self._loop.call_later(seconds, action, *arguments))
