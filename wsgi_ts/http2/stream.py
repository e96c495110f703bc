"""One stream of an HTTP/2 connection, and what a connection tells of its streams."""

from __future__ import annotations

from collections import deque
from typing import Final

#: Names and values of a header block.
Fields = list[tuple[bytes, bytes]]


class Stream:
    """One request and its answer.

    Args:
        number: odd, and larger than that of every earlier one.
        receive_window: bytes that the client may still send on it.
        send_window: bytes that may be sent to the client on it.

    Attributes:
        number, receive_window, send_window: as given, kept up to date by the connection.
        owed: bytes that the application has taken and the client was not told of yet.
        unsent: what waits for the windows, in order; a frame's payload at most at a time.
        trailers: the header block that ends the answer once `unsent` is empty; None while there is more to come.
        is_ended: the client has sent all it will.
        is_answered: all of the answer was handed over for sending.
    """

    __slots__ = (*("is_answered", "is_ended", "number", "owed", "receive_window", "send_window", "trailers", "unsent"),)

    def __init__(self, number: int, receive_window: int, send_window: int) -> None:
        self.number = number
        self.receive_window = receive_window
        self.send_window = send_window
        self.owed = 0
        self.unsent: deque[bytes] = deque()
        self.trailers: bytes | None = None
        self.is_ended = False
        self.is_answered = False


class EventKind:
    """What has come."""

    REQUEST: Final = 0  # the head of a request
    DATA: Final = 1  # a part of its body, empty where only its end has come
    RESET: Final = 2  # the client wants no answer, or has sent what no request may hold
    SENT: Final = 3  # nothing of the answer waits for a window any more


class Event:
    """Something that has come on a stream.

    Args:
        fields: the head; the same object for each head that is made of the same bytes.
        ends: the client sends nothing more on the stream.
    """

    __slots__ = ("data", "ends", "fields", "kind", "stream")

    def __init__(
        self, kind: int, stream: Stream, data: bytes = b"", fields: Fields | None = None, ends: bool = False
    ) -> None:
        self.kind = kind
        self.stream = stream
        self.data = data
        self.fields = fields
        self.ends = ends
