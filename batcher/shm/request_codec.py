"""How a request and its answer lie in a slot: all that writes or reads one, and what is read.

The web worker (or the gRPC server) writes requests and reads answers, the model worker the other way round; offsets and
the two headers are in `layout`. Nobody here stores a slot's state: that is the caller's, and comes last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, Protocol

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import RequestFlag, ResponseFlag
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.tracing.records import STAGES

log = logging.getLogger(__name__)

_SLOT_BYTES: Final = layout.SLOT_BYTES
_INLINE_BYTES: Final = layout.REQUEST_INLINE_BYTES
_RESPONSE_BYTES: Final = layout.RESPONSE.size + layout.BATCH.size
#: Text of an error, with status 500.
DAMAGED: Final = "The answer was damaged in shared memory"


class Destination(Protocol):
    """Where a request goes."""

    @property
    def model(self) -> int:
        """The index of the model version."""

    @property
    def url_path(self) -> bytes:
        """What stands behind the version in the path, for the handler."""

    @property
    def flags(self) -> int:
        """RequestFlag bits."""


class Request:
    """A request as its sender has it. No tuple with names: one is made for every request, and a class takes less time.

    Attributes:
        target: where it goes.
        request_id: 36 ASCII characters.
        head: a request line, header lines, an empty line, for the handler.
        content_type: of the body, as sent; empty for none.
        body: the body; None when it lies in the slot's request range already.
        body_bytes: its length.
        arrival_ns: monotonic time of the request's first byte.
        idle_us: microseconds since the answer before on this connection, NOT_RETURNING for its first request.
        sequence: the id of its sequence; empty where the model has none.
        flags: RequestFlag bits besides the target's.
    """

    __slots__ = (
        *("arrival_ns", "body", "body_bytes", "content_type", "flags", "head", "idle_us", "request_id", "sequence"),
        "target",
    )

    def __init__(
        self,
        target: Destination,
        request_id: str,
        head: bytes,
        content_type: bytes,
        body: bytes | None,
        body_bytes: int,
        arrival_ns: int,
        idle_us: int = layout.NOT_RETURNING,
        sequence: bytes = b"",
        flags: int = 0,
    ) -> None:
        self.target = target
        self.request_id = request_id
        self.head = head
        self.content_type = content_type
        self.body = body
        self.body_bytes = body_bytes
        self.arrival_ns = arrival_ns
        self.idle_us = idle_us
        self.sequence = sequence
        self.flags = flags


class Answer:
    """What a request is answered with: an error, or what its handler, or the app, has returned.

    Attributes:
        error: what is answered instead of all the rest; None where there is no error.
        status: HTTP status.
        phrase: the reason phrase.
        headers: names and values.
        body: bytes, or a view into the slot that is valid until the slot is released.
        stream: set in place of `body` where the answer comes in chunks.
        walk: of a workflow, the request's way through its nodes.
    """

    __slots__ = ("body", "error", "headers", "phrase", "status", "stream", "walk")

    def __init__(self, error: ServerError | None = None) -> None:
        self.error = error
        self.status = 200
        self.phrase = ""
        self.headers: list[tuple[str, str]] = []
        self.body: bytes | memoryview = b""
        self.stream: Iterable[bytes] | None = None
        self.walk: Any = None


def write_request(
    segment: Segment, slot: int, batcher: int, request: Request, body_room: Callable[[int, int], memoryview]
) -> bool:
    """Writes a request into its slot; what is too long for the slot goes into its request range.

    `body_room` gives room in a slot's request range for so many bytes of body.

    Returns:
        Whether HEAD_ROOM bytes at the beginning of the request range are in use.

    Raises:
        SharedMemoryFull: /dev/shm is full.
    """
    target, head, content_type, sequence = request.target, request.head, request.content_type, request.sequence
    body, body_bytes = request.body, request.body_bytes
    url_path = target.url_path
    flags = request.flags | target.flags
    head_bytes, path_bytes, type_bytes, sequence_bytes = len(head), len(url_path), len(content_type), len(sequence)
    inline = head_bytes + path_bytes + type_bytes + sequence_bytes
    if body is None:
        flags |= RequestFlag.BODY_OUTSIDE
        body = b""
    elif inline + body_bytes > _INLINE_BYTES:
        body_room(slot, body_bytes)[:] = body
        flags |= RequestFlag.BODY_OUTSIDE
        body = b""
    is_outside = inline > _INLINE_BYTES
    if is_outside:
        _write_outside(segment, slot, b"".join((head, url_path, content_type, sequence)))
        flags |= RequestFlag.HEAD_OUTSIDE
        head = url_path = content_type = sequence = b""
    model, name = target.model, request.request_id.encode()
    header = layout.REQUEST.pack(
        request.arrival_ns, body_bytes, model, flags, head_bytes, path_bytes, type_bytes, batcher, name, sequence_bytes
    )
    data = b"".join((header, head, url_path, content_type, sequence, body))
    start = segment.first_slot + slot * _SLOT_BYTES
    segment.buffer[start : start + len(data)] = data
    return is_outside


def rewrite_header(segment: Segment, slot: int, batcher: int, model: int, arrival_ns: int) -> None:
    """Changes where the request in a slot goes, and when it has arrived; all else stays."""
    start = segment.first_slot + slot * _SLOT_BYTES
    fields = list(layout.REQUEST.unpack_from(segment.buffer, start))
    fields[0], fields[2], fields[7] = arrival_ns, model, batcher
    segment.buffer[start : start + layout.REQUEST.size] = layout.REQUEST.pack(*fields)


def _write_outside(segment: Segment, slot: int, data: bytes) -> None:
    if len(data) > layout.HEAD_ROOM:
        raise ValueError(f"request head of {len(data)} bytes")
    start = segment.layout.request_payload(slot)
    segment.memory.reserve(start, layout.HEAD_ROOM)
    segment.buffer[start : start + len(data)] = data


def read_request(segment: Segment, slot: int) -> tuple[str, int, bytes, memoryview, bytes, memoryview]:
    """Reads the request in a slot.

    Returns:
        Its id, RequestFlag bits, head, url_path, content type and body; url_path and body are views of the slot.
    """
    start = segment.first_slot + slot * _SLOT_BYTES
    buffer = segment.buffer
    _, body_bytes, _, flags, head_bytes, path_bytes, type_bytes, _, request_id, sequence_bytes = (
        layout.REQUEST.unpack_from(buffer, start)
    )
    start += layout.REQUEST_INLINE
    if flags & RequestFlag.HEAD_OUTSIDE:  # and so is the body, if there is one
        start = segment.layout.request_payload(slot)
    path_start = start + head_bytes
    type_start = path_start + path_bytes
    type_end = type_start + type_bytes
    body_start = type_end + sequence_bytes
    if flags & RequestFlag.BODY_OUTSIDE:
        body_start = segment.layout.request_payload(slot) + layout.HEAD_ROOM
    return (
        str(request_id, "ascii"),
        flags,
        bytes(buffer[start:path_start]),
        buffer[path_start:type_start],
        bytes(buffer[type_start:type_end]) if type_bytes else b"",
        buffer[body_start : body_start + body_bytes],
    )


def write_answer(
    segment: Segment,
    slot: int,
    times: tuple[int, int],
    status: int,
    phrase: str,
    headers: list[tuple[str, str]],
    body: bytes | bytearray | memoryview | None,
    batch: bytes = layout.NO_BATCH,
) -> None:
    """Writes an answer into its slot; what is too long for the slot goes into its payload range.

    `times` are those at which its batch was begun and ended (monotonic ns); headers have no line breaks in names and
    values; where the body is None it comes in chunks (see `stream`). `batch` is what is told of the batch that it was
    run in (`layout.BATCH`).

    Raises:
        ValueError: phrase and headers have more than ANSWER_HEAD_ROOM bytes.
        SharedMemoryFull: /dev/shm is full.
    """
    head = b""
    flags, length, head_bytes = 0, 0, 0
    if phrase or headers:
        head = (phrase + "".join([f"{name}:{value}\n" for name, value in headers])).encode("latin-1")
        head_bytes = len(head)
        if head_bytes > layout.RESPONSE_INLINE_BYTES:
            _write_head_outside(segment, slot, head)
            flags, head = ResponseFlag.HEAD_OUTSIDE, b""
    if body is None:
        flags, body = flags | ResponseFlag.STREAMED, b""
    else:
        length = len(body)
        if len(head) + length > layout.RESPONSE_INLINE_BYTES:
            start = segment.layout.response_payload(slot)
            segment.memory.reserve(start, length)
            segment.buffer[start : start + length] = body
            flags, body = flags | ResponseFlag.BODY_OUTSIDE, b""
    generation = segment.generation(slot)
    header = layout.RESPONSE.pack(*times, length, status, flags, len(phrase), head_bytes - len(phrase), generation)
    segment.write_response(slot, header, batch + head if head else batch, body)


def _write_head_outside(segment: Segment, slot: int, head: bytes) -> None:
    if len(head) > layout.ANSWER_HEAD_ROOM:
        raise ValueError(f"{len(head)} bytes of response headers")
    start = segment.layout.answer_head(slot)
    segment.memory.reserve(start, len(head))
    segment.buffer[start : start + len(head)] = head


def read_answer(segment: Segment, slot: int, is_error: bool) -> tuple[Answer, int]:
    """Reads the answer in a slot; of one that is streamed the status and the headers (`stream` is empty then).

    With `is_error` the body is an error's text; a refusal of the batcher is a ServiceUnavailable, which has none.

    Returns:
        The answer, and how many bytes of the slot's payload range it has taken.
    """
    buffer = segment.buffer
    start, length, status, flags, phrase_bytes, header_bytes = _response_header(segment, slot)
    answer = Answer()
    if not status:
        log.error("The answer in a slot of segment %d is damaged", segment.index)
        answer.error = ServerError(DAMAGED, status=500)
        return answer, 0
    answer.status = status
    held = 0
    if phrase_bytes or header_bytes:
        head_bytes = phrase_bytes + header_bytes
        head = start
        if flags & ResponseFlag.HEAD_OUTSIDE:
            head, held = segment.layout.answer_head(slot), head_bytes
        else:
            start += head_bytes
        text = str(buffer[head : head + head_bytes], "latin-1")
        answer.phrase = text[:phrase_bytes]
        for line in text[phrase_bytes:-1].split("\n") if header_bytes else ():
            name, _, value = line.partition(":")
            answer.headers.append((name, value))
    if flags & ResponseFlag.BODY_OUTSIDE:
        start = segment.layout.response_payload(slot)
        held += length
    elif flags & ResponseFlag.STREAMED:
        answer.stream = ()
        held += layout.STREAM_RING_BYTES
    answer.body = buffer[start : start + length]
    if is_error and answer.stream is None:  # a stream that has failed already is read like others: its state says so
        kind = ServiceUnavailable if flags & ResponseFlag.REFUSED else ServerError
        answer.error = kind(str(answer.body, "utf-8", "replace"), status=status)
    return answer, held


class Times(NamedTuple):
    """How the request in an answered slot was run; all 0 where no worker has run it.

    Attributes:
        started_ns, ended_ns: when its batch was begun, and the handler had returned (monotonic); of a streamed answer
            the end is 0.
        posted_ns: when its batch was dispatched (monotonic).
        number: of that batch, in the worker's mailbox.
        worker: the worker's number.
        size: requests in the batch.
        reason: why it went, a `CloseReason`.
        called_at, prepared_at, inferred_at, returned_at: when the handler was called, its preprocess and its inference
            had ended, and it had returned (monotonic seconds); 0 where that is not known.
    """

    started_ns: int
    ended_ns: int
    posted_ns: int
    number: int
    worker: int
    size: int
    reason: int
    called_at: float
    prepared_at: float
    inferred_at: float
    returned_at: float

    def stages(self) -> list[tuple[str, int, int]]:
        """The handler's stages, each with its begin and end (monotonic ns)."""
        return stages_of(self.called_at, self.prepared_at, self.inferred_at, self.returned_at)

    @classmethod
    def unpacked(cls, data: bytes) -> Times:
        """Reads what `packed_times` has returned."""
        started_ns, ended_ns, *_ = layout.RESPONSE.unpack_from(data)
        return cls(started_ns, ended_ns, *layout.BATCH.unpack_from(data, layout.RESPONSE.size))


def stages_of(
    called_at: float, prepared_at: float, inferred_at: float, returned_at: float
) -> list[tuple[str, int, int]]:
    """What the times at the end of `layout.BATCH` say: see `Times.stages`."""
    if not returned_at:
        return []
    if not prepared_at:  # it does not tell: all of its call counts as one
        return [(STAGES[1], int(called_at * 1e9), int(returned_at * 1e9))]
    marks = [int(each * 1e9) for each in (called_at, prepared_at, inferred_at, returned_at)]
    return list(zip(STAGES, marks, marks[1:], strict=False))


def packed_times(segment: Segment, slot: int) -> bytes:
    """Returns what an answered slot says of its run, as it lies there: a copy costs little, and few want to read it."""
    start = segment.first_slot + slot * _SLOT_BYTES + layout.RESPONSE_HEADER
    return bytes(segment.buffer[start : start + _RESPONSE_BYTES])


def read_times(segment: Segment, slot: int) -> Times:
    """Reads how an answered slot's request was run; right until the slot is taken again."""
    return Times.unpacked(packed_times(segment, slot))


def answer_range(segment: Segment, slot: int) -> tuple[int, int, int, int]:
    """Where the body of a slot's answer lies.

    Returns:
        Its offset in the segment and its length, the answer's HTTP status (0 for a damaged one), and its ResponseFlag
        bits.
    """
    start, length, status, flags, phrase_bytes, header_bytes = _response_header(segment, slot)
    if flags & ResponseFlag.BODY_OUTSIDE:
        return segment.layout.response_payload(slot), length, status, flags
    if flags & ResponseFlag.HEAD_OUTSIDE:
        return start, length, status, flags
    return start + phrase_bytes + header_bytes, length, status, flags


def is_unanswered(segment: Segment, slot: int) -> bool:
    """Whether what lies in an answered slot is no answer to its request: a stray write has changed its state."""
    start = segment.first_slot + slot * _SLOT_BYTES + layout.RESPONSE_HEADER
    generation: int = layout.RESPONSE.unpack_from(segment.buffer, start)[7]
    return generation != segment.generation(slot)


def _response_header(segment: Segment, slot: int) -> tuple[int, int, int, int, int, int]:
    """Reads the header of an answer, which a handler's stray write may have damaged.

    Returns:
        The offset behind it, body bytes, status, flags, phrase bytes and header bytes; all of it lies in what the slot
        owns. Of a damaged one the status is 0, and so is all else but the offset.
    """
    start = segment.first_slot + slot * _SLOT_BYTES + layout.RESPONSE_HEADER
    _, _, length, status, flags, phrase_bytes, header_bytes, generation = layout.RESPONSE.unpack_from(
        segment.buffer, start
    )
    start += _RESPONSE_BYTES
    if generation != segment.generation(slot):  # it answers an earlier request
        return start, 0, 0, 0, 0, 0
    room, head_bytes = layout.RESPONSE_INLINE_BYTES, phrase_bytes + header_bytes
    if not flags & ResponseFlag.HEAD_OUTSIDE:
        room -= head_bytes
    if room < 0 or head_bytes > layout.ANSWER_HEAD_ROOM or status < 100 or status > 999:
        return start, 0, 0, 0, 0, 0
    if length > room and (not flags & ResponseFlag.BODY_OUTSIDE or length > segment.layout.response_range):
        return start, 0, 0, 0, 0, 0
    return start, length, status, flags, phrase_bytes, header_bytes
