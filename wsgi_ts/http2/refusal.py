"""What a client of HTTP/2 is told on a port of HTTP/1.1: its first request is answered with an error, no other one.

HTTP_1_1_REQUIRED (RFC 9113, section 7) would say it in a word, but grpcio 1.85 aborts its process when it is told that.

A server may answer before the end of a request (RFC 9113, section 8.1), but curl 7.88 then reports that its upload has
failed and shows no answer: a short body that is announced is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable

from wsgi_ts.http2.connection import Connection
from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import DEFAULT_WINDOW, ErrorCode, Flag, FrameType, frame, header_block
from wsgi_ts.http2.outbox import reset_frame
from wsgi_ts.http2.stream import Event, EventKind, Fields

_MOST_DIGITS = len(str(DEFAULT_WINDOW))


class Refusal:
    """One connection.

    Args:
        fields: the head of the answer, `:status` first.
        body: its body, which goes into one frame.

    Attributes:
        is_over: the connection is to be closed, once what `receive` has returned is sent.
    """

    def __init__(self, fields: Iterable[tuple[str, str]], body: bytes) -> None:
        self.is_over = False
        self._fields = list(fields)
        self._body = body
        self._connection = Connection(1)
        #: The head of a request whose short body is on its way.
        self._head: Fields = []

    def receive(self, data: bytes) -> bytes:
        """Takes what the client has sent, from its first byte on; returns what is to be sent."""
        try:
            for event in self._connection.receive(data):
                if event.kind == EventKind.REQUEST:
                    self._head = event.fields or []
                is_due = event.ends or (event.kind == EventKind.REQUEST and not _has_short_body(self._head))
                if is_due and not self.is_over:
                    self._answer(event)
        except ConnectionFault:  # its GOAWAY is among what is to be sent
            self.is_over = True
        return self._connection.outbox.take()

    def _answer(self, event: Event) -> None:
        stream, outbox = event.stream, self._connection.outbox
        block = header_block(self._fields)
        is_head = (b":method", b"HEAD") in self._head
        if is_head or stream.send_window < len(self._body):
            outbox.add(frame(FrameType.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, stream.number, block))
        else:
            self._connection.send_head(stream, block)
            outbox.add(frame(FrameType.DATA, Flag.END_STREAM, stream.number, self._body))
        if not event.ends:  # the rest of its body need not be sent
            outbox.add(reset_frame(stream.number, ErrorCode.NO_ERROR))
        outbox.drop(stream)
        self._connection.go_away()
        self.is_over = True


def _has_short_body(head: Fields) -> bool:
    """Returns whether its client sends a body at once that fits into the first window."""
    fields = dict(head)
    length = fields.get(b"content-length", b"")
    # Python refuses to read a number of thousands of digits.
    is_short = length.isdigit() and len(length) <= _MOST_DIGITS and int(length) <= DEFAULT_WINDOW
    return is_short and b"expect" not in fields
