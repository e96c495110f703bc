"""The server's side of one HTTP/2 connection as a state machine (RFC 9113).

It is fed what the socket gives (`receive`), tells what that means as events, and puts what is to be sent into its
outbox. A client has limits in everything that it could make the server keep: bytes of a header block, streams, bytes
that it may send before it is told that they were taken, and answers to frames that it does not read.
"""

from __future__ import annotations

from typing import Final

from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    FRAME_HEAD_BYTES,
    LAST_STREAM,
    MOST_FRAME_BYTES,
    MOST_WINDOW,
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway_frame,
    settings_frame,
    window_frame,
)
from wsgi_ts.http2.header_blocks import MOST_HEADER_BYTES, HeaderBlocks
from wsgi_ts.http2.outbox import Outbox, reset_frame
from wsgi_ts.http2.stream import Event, EventKind, Stream

#: What a client may send on one stream, and on all of them, before it is told that some of it was taken.
STREAM_WINDOW: Final = 1 << 20
CONNECTION_WINDOW: Final = 16 << 20
_PING_BYTES: Final = 8
_WINDOW_BYTES: Final = 4
_SETTING_BYTES: Final = 6


class Connection:
    """One connection.

    Args:
        most_streams: requests under way at a time; further ones are refused as the protocol has it.

    Attributes:
        outbox: what is to be sent.
        last_stream: the highest number of a request that was taken.
        is_going: no further request is taken.
        pings_answered: PINGs of ours that the client has answered.
    """

    def __init__(self, most_streams: int) -> None:
        self.outbox = Outbox()
        self.last_stream = 0
        self.is_going = False
        self.pings_answered = 0
        self._streams = self.outbox.streams
        self._most_streams = most_streams
        self._blocks = HeaderBlocks()
        self._buffer = b""
        self._has_preface = False
        self._has_settings = False
        self._window = CONNECTION_WINDOW
        self._owed = 0
        settings = (
            (Setting.MAX_CONCURRENT_STREAMS, most_streams),
            (Setting.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (Setting.MAX_HEADER_LIST_SIZE, MOST_HEADER_BYTES),
        )
        self.outbox.add(settings_frame(settings))
        self.outbox.add(window_frame(0, CONNECTION_WINDOW - DEFAULT_WINDOW))

    # What comes

    def receive(self, data: bytes) -> list[Event]:
        """Takes what the socket has given; returns what it means.

        Raises:
            ConnectionFault: the client has broken the protocol; what came before that is lost with the connection.
        """
        events: list[Event] = []
        try:
            self._parse(self._buffer + data if self._buffer else data, events)
        except ConnectionFault as fault:
            self.outbox.add(goaway_frame(self.last_stream, fault.code, fault.text))
            self.is_going = True
            raise
        return events

    def _parse(self, data: bytes, events: list[Event]) -> None:
        start = 0
        if not self._has_preface:
            if not data.startswith(PREFACE[: len(data)]):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no HTTP/2")
            if len(data) < len(PREFACE):
                self._buffer = data
                return
            self._has_preface = True
            start = len(PREFACE)
        end = len(data)
        while end - start >= FRAME_HEAD_BYTES:
            length = data[start] << 16 | data[start + 1] << 8 | data[start + 2]
            if length > DEFAULT_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            body = start + FRAME_HEAD_BYTES
            if end - body < length:
                break
            number = int.from_bytes(data[start + 5 : body], "big") & LAST_STREAM
            self._frame(data[start + 3], data[start + 4], number, data[body : body + length], events)
            start = body + length
        self._buffer = data[start:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        if self._blocks.stream and (kind != FrameType.CONTINUATION or number != self._blocks.stream):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame inside of a header block")
        if not self._has_settings:
            if kind != FrameType.SETTINGS or flags & Flag.ACK:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is no SETTINGS")
            self._has_settings = True
        if kind == FrameType.DATA:
            self._on_data(flags, number, payload, events)
        elif kind == FrameType.HEADERS:
            self._on_headers(flags, number, payload, events)
        elif kind == FrameType.CONTINUATION:
            self._on_continuation(flags, number, payload, events)
        elif kind == FrameType.WINDOW_UPDATE:
            self._on_window(number, payload, events)
        elif kind == FrameType.RST_STREAM:
            self._on_reset(number, payload, events)
        elif kind == FrameType.SETTINGS:
            self._on_settings(flags, number, payload, events)
        elif kind == FrameType.PING:
            self._on_ping(flags, number, payload)
        elif kind == FrameType.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a push from a client")
        elif kind == FrameType.GOAWAY and number:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        # PRIORITY, GOAWAY and frames of extensions change nothing here.

    def _on_data(self, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        # Padding counts, too, and so does what comes for streams that are over.
        counted = len(payload)
        self._window -= counted
        if self._window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window has room for")
        data = _unpadded(payload) if flags & Flag.PADDED else payload
        stream = self._streams.get(number)
        self._owe(counted)
        if stream is None or stream.is_ended:
            self._on_closed(number, "DATA")
            return
        stream.receive_window -= counted
        if stream.receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window has room for")
        stream.owed += counted - len(data)
        stream.is_ended = bool(flags & Flag.END_STREAM)
        events.append(Event(EventKind.DATA, stream, data, None, stream.is_ended))

    def _on_closed(self, number: int, what: str) -> None:
        """A frame for a stream that takes none. One that the server has ended may have some on the way."""
        if number == 0 or number > self.last_stream or not number & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {number}, which was never opened")
        if number in self._streams:
            raise ConnectionFault(ErrorCode.STREAM_CLOSED, f"{what} on stream {number} after its end")

    def _on_headers(self, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        if not number & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {number}")
        if flags & Flag.PADDED:
            payload = _unpadded(payload)
        if flags & Flag.PRIORITY:
            if len(payload) < 5:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without room for its priority")
            if int.from_bytes(payload[:4], "big") & LAST_STREAM == number:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {number} depends on itself")
            payload = payload[5:]
        ends = bool(flags & Flag.END_STREAM)
        if flags & Flag.END_HEADERS:
            self._on_block(number, payload, ends, events)
        else:
            self._blocks.begin(number, payload, ends)

    def _on_continuation(self, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        blocks = self._blocks
        if not blocks.stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        blocks.add(payload)
        if flags & Flag.END_HEADERS:
            self._on_block(number, blocks.take(), blocks.ends, events)

    def _on_block(self, number: int, block: bytes, ends: bool, events: list[Event]) -> None:
        """A whole header block: the head of a request, or its trailers."""
        fields = self._blocks.fields(block)
        stream = self._streams.get(number)
        if stream is not None:
            if stream.is_ended:
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {number} after its end")
            if not ends:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"trailers of stream {number} that do not end it")
            stream.is_ended = True
            events.append(Event(EventKind.DATA, stream, b"", None, True))
            return
        if number <= self.last_stream:
            return  # trailers of a stream that the server has ended
        self.last_stream = number
        if self.is_going or len(self._streams) >= self._most_streams:
            self.outbox.reply(reset_frame(number, ErrorCode.REFUSED_STREAM))
            return
        stream = self._streams[number] = Stream(number, STREAM_WINDOW, self.outbox.first_window)
        stream.is_ended = ends
        events.append(Event(EventKind.REQUEST, stream, b"", fields, ends))

    def _on_window(self, number: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != _WINDOW_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        more = int.from_bytes(payload, "big") & LAST_STREAM
        if number == 0:
            self.outbox.widen(more, events)
            return
        stream = self._streams.get(number)
        if stream is None:
            if number > self.last_stream:
                self._on_closed(number, "WINDOW_UPDATE")
            return
        stream.send_window += more
        if not more or stream.send_window > MOST_WINDOW:
            self._fail(stream, ErrorCode.FLOW_CONTROL_ERROR if more else ErrorCode.PROTOCOL_ERROR, events)
        else:
            self.outbox.widen_stream(stream, events)

    def _on_reset(self, number: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self._streams.get(number)
        if stream is None:
            self._on_closed(number, "RST_STREAM")
            return
        self.outbox.drop(stream)
        events.append(Event(EventKind.RESET, stream))

    def _on_settings(self, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        if number:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & Flag.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement with settings in it")
            return
        if len(payload) % _SETTING_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS")
        for start in range(0, len(payload), _SETTING_BYTES):
            name = int.from_bytes(payload[start : start + 2], "big")
            self._set(name, int.from_bytes(payload[start + 2 : start + _SETTING_BYTES], "big"))
        self.outbox.reply(frame(FrameType.SETTINGS, Flag.ACK, 0, b""))
        self.outbox.go_on(events)

    def _set(self, name: int, value: int) -> None:
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > MOST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"an initial window of {value}")
            self.outbox.set_first_window(value)
        elif name == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_BYTES <= value <= MOST_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
            self.outbox.set_frame_bytes(value)
        elif name == Setting.ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != _PING_BYTES:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING")
        if flags & Flag.ACK:
            self.pings_answered += 1
        else:
            self.outbox.reply(frame(FrameType.PING, Flag.ACK, 0, payload))

    def _fail(self, stream: Stream, code: int, events: list[Event]) -> None:
        """Ends a stream on which the client has broken the protocol."""
        self.reset(stream, code)
        events.append(Event(EventKind.RESET, stream))

    # What goes

    def taken(self, stream: Stream, length: int) -> None:
        """Lets the client send on: the application keeps so many bytes of a stream's body no longer."""
        stream.owed += length
        if stream.owed >= STREAM_WINDOW // 4 and not stream.is_ended and stream.number in self._streams:
            stream.receive_window += stream.owed
            self.outbox.add(window_frame(stream.number, stream.owed))
            stream.owed = 0

    def send_head(self, stream: Stream, block: bytes) -> None:
        """Sends the head of an answer, with a header block of at most a frame."""
        self.outbox.add(frame(FrameType.HEADERS, Flag.END_HEADERS, stream.number, block))

    def send_end(self, stream: Stream) -> None:
        """Ends an answer that has no trailers, and of which all was sent."""
        self.outbox.add(frame(FrameType.DATA, Flag.END_STREAM, stream.number, b""))
        self.outbox.drop(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """Ends a stream at once; what waits to be sent on it is dropped."""
        if stream.number in self._streams:
            self.outbox.add(reset_frame(stream.number, code))
            self.outbox.drop(stream)

    def go_away(self, last_stream: int | None = None) -> None:
        """Says that no further request is taken.

        Args:
            last_stream: the last one that is; None for those that have come so far. LAST_STREAM only announces it:
                what the client has sent before it heard of it is still taken.
        """
        if last_stream is None:
            self.is_going = True
            last_stream = self.last_stream
        self.outbox.add(goaway_frame(last_stream, ErrorCode.NO_ERROR))

    def ping(self) -> None:
        """Has the client answer (`pings_answered`)."""
        self.outbox.add(frame(FrameType.PING, 0, 0, bytes(_PING_BYTES)))

    def _owe(self, length: int) -> None:
        """Gives the connection's window back at once: the streams' windows bound what is kept."""
        self._owed += length
        if self._owed >= CONNECTION_WINDOW // 4:
            self._window += self._owed
            self.outbox.add(window_frame(0, self._owed))
            self._owed = 0


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than the frame is long")
    return payload[1 : len(payload) - payload[0]]
