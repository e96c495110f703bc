"""What a connection sends, as far as the client has room for it (RFC 9113, section 5.2)."""

from __future__ import annotations

from typing import Final

from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import DEFAULT_FRAME_BYTES, DEFAULT_WINDOW, MOST_WINDOW, ErrorCode, Flag, FrameType, frame
from wsgi_ts.http2.stream import Event, EventKind, Stream

#: What the server itself has to say (acknowledgements and the like) while the client reads nothing of it.
MOST_UNREAD_REPLIES: Final = 64 << 10
#: Longer frames than this are not sent, whatever the client takes.
_MOST_FRAME_BYTES: Final = 1 << 20


class Outbox:
    """The frames that are to be sent now, and the data that waits for the windows.

    Attributes:
        streams: those that are not over, by number.
        first_window: what may be sent on a stream that begins.
        is_blocked: the socket takes nothing for the moment, so data waits as it waits for windows.
    """

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.first_window = DEFAULT_WINDOW
        self.is_blocked = False
        self._window = DEFAULT_WINDOW
        self._frame_bytes = DEFAULT_FRAME_BYTES
        self._waiting: dict[int, Stream] = {}
        self._replies = 0
        self._out: list[bytes] = []

    @property
    def has_output(self) -> bool:
        """Whether something is to be sent now."""
        return bool(self._out)

    def take(self) -> bytes:
        """Returns what is to be sent now."""
        out = self._out
        if not out:
            return b""
        self._out = []
        self._replies = 0
        return out[0] if len(out) == 1 else b"".join(out)

    def add(self, data: bytes) -> None:
        """Adds a frame that needs no window."""
        self._out.append(data)

    def reply(self, data: bytes) -> None:
        """Adds a frame that a frame of the client asks for.

        Raises:
            ConnectionFault: the client asks, and does not read.
        """
        self._replies += len(data)
        self._out.append(data)
        if self._replies > MOST_UNREAD_REPLIES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that want an answer")

    def set_first_window(self, value: int) -> None:
        """Sets what may be sent on each stream; those that are open get the difference.

        Raises:
            ConnectionFault: no window can be so large.
        """
        change = value - self.first_window
        self.first_window = value
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > MOST_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"an initial window of {value}")

    def set_frame_bytes(self, value: int) -> None:
        """Sets the longest frame that the client takes."""
        self._frame_bytes = min(value, _MOST_FRAME_BYTES)

    def widen(self, more: int, events: list[Event]) -> None:
        """Gives the connection's window so many bytes more, and sends what has waited for them.

        Raises:
            ConnectionFault: no window can be so large.
        """
        self._window += more
        if not more or self._window > MOST_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "a window of the connection that cannot be")
        self.go_on(events)

    def widen_stream(self, stream: Stream, events: list[Event]) -> None:
        """Sends what has waited for a stream's window, which is larger now."""
        if stream.number in self._waiting:
            self._send_waiting(stream, events)

    def send_data(self, stream: Stream, data: bytes) -> None:
        """Sends a part of an answer, as far as there is room for it; the rest waits."""
        length = len(data)
        most = self._frame_bytes
        room = 0 if stream.unsent or self.is_blocked else min(stream.send_window, self._window, most)
        if length <= room:
            self._send(stream, data)
            return
        for start in range(0, length, most):
            stream.unsent.append(data[start : start + most])
        self._waiting[stream.number] = stream
        self._send_waiting(stream, None)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """Ends an answer, with a header block of at most a frame; nothing more can be sent on the stream."""
        stream.is_answered = True
        if stream.unsent:
            stream.trailers = block
        else:
            self._end(stream, block)

    def go_on(self, events: list[Event]) -> None:
        """Sends what has waited for the socket or the connection's window."""
        for stream in list(self._waiting.values()):
            self._send_waiting(stream, events)

    def drop(self, stream: Stream) -> None:
        """Forgets a stream, with what waits to be sent on it."""
        stream.is_ended = stream.is_answered = True
        stream.unsent.clear()
        self.streams.pop(stream.number, None)
        self._waiting.pop(stream.number, None)

    def _send_waiting(self, stream: Stream, events: list[Event] | None) -> None:
        """Sends of a stream what its windows have room for; with `events` it tells of the end of it."""
        unsent = stream.unsent
        while unsent and not self.is_blocked:
            room = min(stream.send_window, self._window)
            if room <= 0:
                return
            data = unsent[0]
            if len(data) <= room:
                unsent.popleft()
            else:
                unsent[0] = data[room:]
                data = data[:room]
            self._send(stream, data)
        if unsent:
            return
        del self._waiting[stream.number]
        if stream.trailers is not None:
            self._end(stream, stream.trailers)
        elif events is not None:
            events.append(Event(EventKind.SENT, stream))

    def _send(self, stream: Stream, data: bytes) -> None:
        length = len(data)
        stream.send_window -= length
        self._window -= length
        self._out.append(frame(FrameType.DATA, 0, stream.number, data))

    def _end(self, stream: Stream, block: bytes) -> None:
        self._out.append(frame(FrameType.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream.number, block))
        if not stream.is_ended:
            # The client need not send the rest of what nobody reads (RFC 9113, section 8.1).
            self._out.append(reset_frame(stream.number, ErrorCode.NO_ERROR))
        self.drop(stream)


def reset_frame(number: int, code: int) -> bytes:
    """Returns the frame that ends a stream at once."""
    return frame(FrameType.RST_STREAM, 0, number, code.to_bytes(4, "big"))
