"""Bodies of requests that are received into memory: of a known length, or in chunks.

Both kinds are fed what comes behind the head, until they are complete.
"""

from __future__ import annotations

import httptools

from wsgi_ts.http.head import BadHead

#: What the framing of a chunked body may take besides as many bytes as twice its content: enough for 65536 chunks of
#: one byte each.
MAX_FRAMING_BYTES = 262144


class SizedBody:
    """A body whose length the head has announced.

    Attributes:
        data: what has come of it.
        rest: bytes behind the body (the next request of a pipelining client).
        too_large: never; what is announced is checked before.
    """

    too_large = False

    def __init__(self, length: int) -> None:
        self.data = bytearray()
        self.rest = b""
        self._length = length

    @property
    def received(self) -> int:
        """Bytes that have come."""
        return len(self.data)

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return len(self.data) == self._length

    def feed(self, data: bytes) -> None:
        """Takes the next bytes from the socket."""
        missing = self._length - len(self.data)
        self.data += data[:missing]
        self.rest = data[missing:]


class _Decoded:
    """httptools' callbacks for a chunked body.

    An object of its own, as one that held its parser could only be freed by the garbage collector, which runs seldom.
    """

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.complete = False
        self.too_large = False
        self._limit = limit

    def on_body(self, data: bytes) -> None:
        if len(self.data) + len(data) > self._limit:
            self.too_large = True
        elif not self.too_large:
            self.data += data

    def on_message_complete(self) -> None:
        self.complete = True


class ChunkedBody:
    """Decodes a chunked body; feed it what comes behind the head.

    Args:
        limit: largest decoded body.

    Attributes:
        received: bytes that were fed, framing included.
        rest: bytes behind the body (the next request of a pipelining client).
    """

    def __init__(self, limit: int) -> None:
        self.rest = b""
        self._decoded = _Decoded(limit)
        self.received = 0
        self._tail = b""
        # llhttp can only be told of a chunked body by a head; a minimal one of our own keeps its state machine whole.
        self._parser = httptools.HttpRequestParser(self._decoded)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    @property
    def data(self) -> bytearray:
        """What was decoded so far."""
        return self._decoded.data

    @property
    def complete(self) -> bool:
        """The last chunk and the trailers were read."""
        return self._decoded.complete

    @property
    def too_large(self) -> bool:
        """The limit was passed."""
        return self._decoded.too_large

    def feed(self, data: bytes) -> None:
        """Takes the next bytes from the socket.

        Raises:
            BadHead: they are not a chunked body, or one with more framing than content.
        """
        self.received += len(data)
        # The body ends with an empty line; without one in what was just read, it cannot end there.
        may_end = b"\n\r\n" in self._tail + data
        self._tail = (self._tail + data)[-2:]
        try:
            if may_end:
                self._feed_to_end(data)
            else:
                self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BadHead(400, "Invalid chunked body.") from error
        framing = self.received - 2 * len(self.data)
        if framing > MAX_FRAMING_BYTES and not self.complete and not self.too_large:
            raise BadHead(400, "The chunked body has more framing than content.")

    def _feed_to_end(self, data: bytes) -> None:
        # The parser would take pipelined bytes for a message of its own, so the end is found line by line, which is
        # affordable: only reads that may hold the end come here.
        start = 0
        while start < len(data) and not self.complete:
            newline = data.find(b"\n", start)
            stop = len(data) if newline < 0 else newline + 1
            self._parser.feed_data(data[start:stop])
            start = stop
        self.rest = data[start:]
