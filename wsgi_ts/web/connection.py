"""One client connection of the web worker: HTTP/1.1 as a state machine, without a socket call or a clock.

A connection is fed what the socket has given, says what that means (`next_head`, its body), and has queued what is to
be sent. `sending` moves the bytes, `requests` and `answers` decide, and the loop keeps the time.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice
from typing import Any, Final

from wsgi_ts.batcher.shm.layout import NOT_RETURNING
from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.errors import ServerError
from wsgi_ts.http.body import ChunkedBody, SizedBody
from wsgi_ts.http.head import Head, check_partial_head, parse_head
from wsgi_ts.http2.refusal import Refusal
from wsgi_ts.tracing.context import TraceContext
from wsgi_ts.web.listeners import Endpoint

#: What one connection may receive, or send, in one turn of the loop: others are waiting.
TURN_BYTES: Final = 1024 * 1024
_SMALLEST_ROOM: Final = 65536
_MOST_PARTS: Final = 64
_LINE_ENDS: Final = b"\r\n"
#: The first line of a client that speaks HTTP/2 without asking whether the server does.
_HTTP_2: Final = b"PRI * HTTP/2.0\r\n"


class Phase:
    """What a connection waits for."""

    HEAD: Final = 0  # the (rest of the) head of a request; idle when nothing of it is there
    BODY: Final = 1  # the rest of the body
    ANSWER: Final = 2  # a model worker, or a thread of the pool
    STREAM: Final = 3  # more chunks of a streamed answer
    SEND: Final = 4  # the client to take the rest of the answer
    LINGER: Final = 5  # the client to close, after an answer that ended the connection early
    REFUSE: Final = 6  # a request of HTTP/2, which is refused


class SlotBody:
    """A body that is received straight into a slot.

    Args:
        length: of the whole body, in bytes.
        received: how many of them have come.

    Attributes:
        room: where the body is received, as far as it may come now.
    """

    __slots__ = ("length", "received", "room")

    def __init__(self, length: int, received: int) -> None:
        self.length = length
        self.received = received
        self.room = memoryview(b"")

    def next_room(self, reserved: int) -> int:
        """Returns how many bytes to reserve next, by what has come and not by the announced length.

        `reserved` is how many the slot has room for already.
        """
        have = self.received
        return min(self.length, max(reserved, have + min(max(have, _SMALLEST_ROOM), TURN_BYTES)))


class Connection:
    """The state of one connection.

    Args:
        peer: the client's address, as the access log has it.

    Attributes:
        fd, events, limit_at, closed: the loop's: the socket's descriptor, what epoll waits for, the monotonic time at
            which the connection is given up, and whether it is in the table no more (another one may have its
            descriptor then).
        phase: what it waits for.
        buffer: received and not yet used.
        half_closed: the client has sent all it will.
        close_after: the connection ends with the answer under way.
        ignored: bytes that came after the last answer.
        head, target, request_id, arrival_ns: the request under way: its head, where it goes if it is a prediction, its
            id, and the monotonic time at which it came.
        answered_ns: when the last answer on this connection was sent, 0 before the first.
        submitted_ns: the monotonic time at which it was submitted to a batcher, 0 before.
        slot: where the request lies, -1 for nowhere.
        answered_slot: where its answer was read from, -1 for nowhere.
        walk: of a workflow, its way through the nodes, once it is answered.
        fault: what its client is told is wrong, None for nothing.
        left_in: where it was when nobody waited for it any more (`wsgi_ts.tracing.records`); empty while somebody does.
        trace, parent: its place in a trace that is recorded, None for none, and the client's span, if any.
        release_slot: the slot that the answer is sent from, -1 for none.
        body: what of the body is there; None before the first and after the last byte of it.
        refusal: what a client of HTTP/2 is told; None for others.
        form: the whole body, while plugins decide on the model that it names; None at all other times.
        body_seen: how much of the body had come when its limit was last looked at.
        unsent: bytes that are queued.
        stream_chunked: the streamed answer under way is sent in chunks of HTTP.
        sends_events: it tells of each node of a workflow as it ends.
    """

    __slots__ = (
        *("answered_ns", "answered_slot", "arrival_ns", "body", "body_seen", "buffer", "close_after", "closed"),
        *("endpoint", "events", "fault", "fd", "form", "half_closed", "head", "ignored", "left_in", "limit_at"),
        *("out", "parent", "peer", "phase", "refusal", "release_slot", "request_id", "sends_events", "slot", "sock"),
        *("stream_chunked", "submitted_ns", "target", "trace", "unsent", "walk"),
    )

    def __init__(self, sock: socket.socket, peer: str, endpoint: Endpoint) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.endpoint = endpoint
        self.events = 0
        self.limit_at = 0.0
        self.closed = False
        self.phase: int = Phase.HEAD
        self.buffer = b""
        self.half_closed = False
        self.close_after = False
        self.ignored = 0
        self.head: Head | None = None
        self.target: Target | None = None
        self.request_id = ""
        self.arrival_ns = 0
        self.answered_ns = 0
        self.submitted_ns = 0
        self.slot = -1
        self.answered_slot = -1
        self.release_slot = -1
        self.walk: Any = None
        self.fault: ServerError | None = None
        self.left_in = ""
        self.trace: TraceContext | None = None
        self.parent = ""
        self.body: SizedBody | ChunkedBody | SlotBody | None = None
        self.form: bytes | None = None
        self.body_seen = 0
        self.refusal: Refusal | None = None
        self.out: deque[memoryview | bytes] = deque()
        self.unsent = 0
        self.stream_chunked = False
        self.sends_events = False

    @property
    def idle_us(self) -> int:
        """Microseconds from the last answer to this request, NOT_RETURNING for the first one."""
        if not self.answered_ns:
            return NOT_RETURNING
        return max(0, self.arrival_ns - self.answered_ns) // 1000

    @property
    def wants_head_only(self) -> bool:
        """Whether the answer is sent without its body."""
        return self.head is not None and self.head.method == "HEAD"

    @property
    def after_answer(self) -> str:
        """What becomes of the connection after the answer, as the header `connection` says it."""
        return "close" if self.close_after else "keep-alive"

    @property
    def opens_with_http2(self) -> bool:
        """Whether the first that the client has sent is what begins a connection of HTTP/2 (RFC 9113, 3.4)."""
        return not self.answered_ns and self.buffer.startswith(_HTTP_2)

    def next_head(self) -> Head | None:
        """Takes the next request's head out of what was received; None while it is not complete.

        Raises:
            BadHead: it is none that this server accepts.
        """
        buffer = self.buffer
        if buffer[0] in _LINE_ENDS:
            buffer = self.buffer = buffer.lstrip(_LINE_ENDS)
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            check_partial_head(buffer)
            return None
        end += 4
        head = parse_head(buffer[:end])
        self.buffer = buffer[end:]
        return head

    def next_request(self) -> None:
        """Forgets the answered request; the connection waits for the next head."""
        self.phase = Phase.HEAD
        self.head = self.body = self.form = None
        self.target = None
        self.request_id = ""
        self.arrival_ns = self.submitted_ns = 0
        self.slot = self.answered_slot = -1
        self.walk = self.fault = self.trace = None
        self.left_in = ""

    def answer_head(self, answer: Answer) -> bytes:
        """Returns the status line and the headers of an answer."""
        fields = "".join([f"{name}: {value}\r\n" for name, value in answer.headers])
        text = f"HTTP/1.1 {answer.status} {answer.phrase}\r\n{fields}connection: {self.after_answer}\r\n\r\n"
        return text.encode("latin-1")

    def begin_stream(self, answer: Answer) -> None:
        """Queues the head of a streamed answer; a client of HTTP/1.0 knows its end by the end of the connection."""
        self.phase = Phase.STREAM
        self.stream_chunked = self.head is not None and self.head.http_1_1
        if self.stream_chunked:
            answer.headers.append(("transfer-encoding", "chunked"))
        if not self.stream_chunked or answer.status >= 400:  # TorchServe closes after every error
            self.close_after = True
        self.queue(self.answer_head(answer))

    def queue_chunk(self, chunk: bytes) -> None:
        """Queues a chunk of a streamed answer."""
        if not self.wants_head_only:
            self.queue(b"%x\r\n%b\r\n" % (len(chunk), chunk) if self.stream_chunked else chunk)

    def end_stream(self) -> None:
        """Queues what tells the client that the streamed answer is whole."""
        if self.stream_chunked and not self.wants_head_only:
            self.queue(b"0\r\n\r\n")

    def queue(self, data: memoryview | bytes) -> None:
        """Adds to what is to be sent."""
        self.out.append(data)
        self.unsent += len(data)

    def next_parts(self) -> list[memoryview | bytes]:
        """Returns what is to be sent next, as much as one call may take."""
        first = self.out[0]
        if len(first) > TURN_BYTES:
            return [memoryview(first)[:TURN_BYTES]]
        return list(islice(self.out, _MOST_PARTS))

    def note_sent(self, sent: int) -> None:
        """Forgets so many bytes of what is to be sent."""
        out = self.out
        self.unsent -= sent
        while sent:
            first = out[0]
            if sent < len(first):
                out[0] = memoryview(first)[sent:]
                break
            sent -= len(first)
            out.popleft()
        while out and not len(out[0]):
            out.popleft()
