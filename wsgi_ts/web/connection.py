"""One client connection of the web worker: what was received, what is awaited, what is still to be sent.

A `Connection` is a row in the worker's table, not a stack: the loop calls its methods when the socket or an answer is
ready, and they never block.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice
from typing import Final

from wsgi_ts.batcher.shm import layout
from wsgi_ts.dataplane.plane import Target
from wsgi_ts.http.head import ChunkedBody, Head

RECEIVE_BYTES = 65536
#: A body above this is received straight into its slot.
DIRECT_BODY_BYTES = 4096
#: What a streamed answer may have unsent before its reader counts as gone.
MAX_UNSENT_STREAM = 16 * 1024 * 1024
#: What a client may send behind a request while that is being answered (pipelining).
MAX_AHEAD = 65536
#: What one connection may receive, or send, in one turn of the loop: others are waiting.
TURN_BYTES = 1024 * 1024
_SMALLEST_ROOM = 65536
_MOST_PARTS = 64


class Phase:
    """What a connection waits for."""

    HEAD: Final = 0  # the (rest of the) head of a request; idle when nothing of it is there
    BODY: Final = 1  # the rest of the body
    ANSWER: Final = 2  # a model worker, or a thread of the pool
    STREAM: Final = 3  # more chunks of a streamed answer
    SEND: Final = 4  # the client to take the rest of the answer
    LINGER: Final = 5  # the client to close, after an answer that ended the connection early


class Connection:
    """State of one connection (see the module's text; the web worker acts on it).

    Attributes:
        limit_at: monotonic time at which the connection is given up, by what its phase allows.
        body_seen: how much of the body had come when its limit was last looked at.
        buffer: received and not yet used.
        out: to be sent; bytes, or a view into a slot that is released when `release_slot` is.
        body_room: where the body is received, as far as it may come now; None where none is received into a slot.
        closed: it is in the table no more, and another one may have its descriptor.
        answered_ns: when the last answer on this connection was sent, 0 before the first.
    """

    __slots__ = (
        "answered_ns",
        "arrival_ns",
        "body",
        "body_have",
        "body_room",
        "body_seen",
        "buffer",
        "chunked",
        "close_after",
        "closed",
        "events",
        "fd",
        "half_closed",
        "head",
        "ignored",
        "limit_at",
        "listener",
        "out",
        "peer",
        "phase",
        "release_slot",
        "request_id",
        "slot",
        "sock",
        "stream_chunked",
        "target",
        "unsent",
    )

    def __init__(self, sock: socket.socket, peer: str, listener: int) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.listener = listener
        self.phase: int = Phase.HEAD
        self.limit_at = 0.0
        self.buffer = b""
        self.head: Head | None = None
        self.target: Target | None = None
        self.request_id = ""
        self.arrival_ns = 0
        self.answered_ns = 0
        self.slot = -1
        self.release_slot = -1
        self.body: bytearray | None = None
        self.body_room: memoryview | None = None
        self.body_have = 0
        self.body_seen = 0
        self.chunked: ChunkedBody | None = None
        self.out: deque[memoryview | bytes] = deque()
        self.unsent = 0
        self.events = 0
        self.close_after = False
        self.closed = False
        self.half_closed = False
        self.stream_chunked = False
        self.ignored = 0

    @property
    def idle_us(self) -> int:
        """Microseconds from the last answer to this request, NOT_RETURNING for the first one."""
        if not self.answered_ns:
            return layout.NOT_RETURNING
        return max(0, self.arrival_ns - self.answered_ns) // 1000

    @property
    def body_received(self) -> int:
        """Bytes of the body under way that have come."""
        if self.chunked is not None:
            return self.chunked.received
        return self.body_have if self.body is None else len(self.body)

    def next_room(self, reserved: int) -> int:
        """How many bytes of the body to have room for next: what has come decides, not what is announced.

        Args:
            reserved: how many the slot has room for already.
        """
        have = self.body_have
        length = self.head.content_length if self.head is not None else 0
        return min(length, max(reserved, have + min(max(have, _SMALLEST_ROOM), TURN_BYTES)))

    def next_request(self) -> None:
        """Forgets the answered request; the connection waits for the next head."""
        self.phase = Phase.HEAD
        self.slot = -1
        if self.body is not None or self.chunked is not None:
            self.body = None
            self.chunked = None

    def queue(self, data: memoryview | bytes) -> None:
        """Adds to what is to be sent."""
        self.out.append(data)
        self.unsent += len(data)

    def send_now(self, data: bytes) -> bool:
        """Sends a small answer; True when all of it went at once, else the rest is queued.

        Raises:
            OSError: the client has gone.
        """
        if self.out:
            self.queue(data)
            return False
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return True
        self.queue(memoryview(data)[sent:])
        return False

    def send_queued(self) -> bool:
        """Sends what the socket takes in one turn; True when nothing is left.

        Raises:
            OSError: the client has gone.
        """
        out = self.out
        room = TURN_BYTES
        while out:
            if room <= 0:
                return False
            try:
                sent = self.sock.sendmsg(list(islice(out, _MOST_PARTS))) if len(out) > 1 else self._send_part(out[0])
            except BlockingIOError:
                return False
            self.unsent -= sent
            room -= sent
            while sent:
                first = out[0]
                if sent < len(first):
                    out[0] = memoryview(first)[sent:]
                    break
                sent -= len(first)
                out.popleft()
            while out and not len(out[0]):
                out.popleft()
        return True

    def _send_part(self, part: memoryview | bytes) -> int:
        return self.sock.send(part if len(part) <= TURN_BYTES else memoryview(part)[:TURN_BYTES])
