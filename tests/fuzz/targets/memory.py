"""What another process has left in a slot: a handler may write over the memory that it shares."""

from __future__ import annotations

import contextlib
import os
import struct
from types import SimpleNamespace

from wsgi_ts.batcher.shm import layout, stream
from wsgi_ts.batcher.shm.body_codec import pack_fields, unpack_fields, unpack_references
from wsgi_ts.batcher.shm.layout import SegmentLayout
from wsgi_ts.batcher.shm.request_codec import Request, read_answer, read_request, write_answer, write_request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix

_PREFIX = f"wsgi-ts-{'e' * 24}{os.getpid():08x}"
_SLOT = 1
_ID = "00000000-0000-4000-8000-000000000000"
_segments: list[Segment] = []


def _segment() -> Segment:
    if not _segments:
        _segments.append(Segment.create(_PREFIX, 1, SegmentLayout(2, 1, 10_000, 10_000)))
        unlink_prefix(_PREFIX)
    return _segments[0]


def answer_slot(data: bytes) -> None:
    """Any bytes where an answer should be are read as some answer, of bytes in the segment."""
    segment = _segment()
    data = data[: layout.SLOT_BYTES - layout.RESPONSE_HEADER]
    segment.write_response(_SLOT, data, b"", b"")
    for is_error in (False, True):
        answer, held = read_answer(segment, _SLOT, is_error)
        assert 0 <= held <= segment.layout.response_range + layout.ANSWER_HEAD_ROOM
        assert len(answer.body) <= segment.layout.response_range
        assert 0 <= answer.status <= 65535
    _write_and_read(segment, data)


def stream_ring(data: bytes) -> None:
    """Whatever stands in a stream's ring and its two positions, taking the chunks ends."""
    segment = _segment()
    stream.open_ring(segment, _SLOT)
    positions, data = data[:16], data[16:]
    words = struct.unpack("<QQ", positions.ljust(16, b"\0"))
    first = (_SLOT + 1) * layout.SLOT_WORDS - len(words)
    segment.slot_words[first], segment.slot_words[first + 1] = words
    start = segment.layout.response_payload(_SLOT)
    segment.buffer[start : start + len(data)] = data
    chunks = stream.take_chunks(segment, _SLOT)
    assert sum(map(len, chunks)) <= layout.STREAM_RING_BYTES
    assert not stream.take_chunks(segment, _SLOT)
    _push_and_take(segment, data)


def _push_and_take(segment: Segment, data: bytes) -> None:
    stream.open_ring(segment, _SLOT)
    pieces = [data[at : at + 7] for at in range(0, len(data), 7)]
    assert all(stream.try_push(segment, _SLOT, piece) for piece in pieces)
    assert stream.take_chunks(segment, _SLOT) == pieces


def _write_and_read(segment: Segment, data: bytes) -> None:
    lines = [line.decode("latin-1").partition(":") for line in data[:500].split(b"\n")]
    headers = [(name.replace("\n", ""), value) for name, _, value in lines]
    write_answer(segment, _SLOT, (1, 2), 200, data[:9].decode("latin-1"), headers, data)
    answer, _ = read_answer(segment, _SLOT, is_error=False)
    assert (answer.phrase, answer.headers, answer.body) == (data[:9].decode("latin-1"), headers, data)


def request_slot(data: bytes) -> None:
    """A request is read as it was written; named values and references that lie are noticed, or stay in the body."""
    segment = _segment()
    head, _, rest = data.partition(b"\r\n\r\n")
    content_type, _, body = rest.partition(b"\n")
    if len(head) + len(content_type) < layout.HEAD_ROOM - 300 and len(body) <= 10_000:
        target = SimpleNamespace(model=1, url_path=content_type[:100], flags=0)
        request = Request(target, _ID, head, content_type, body, len(body), 7, sequence=head[:100])
        write_request(segment, _SLOT, 0, request, _body_room)
        found = read_request(segment, _SLOT)
        assert (found[0], found[2], found[4], found[5]) == (_ID, head, content_type, body)
    view = memoryview(data)
    with contextlib.suppress(struct.error, UnicodeDecodeError):
        fields = {name: bytes(value) for name, value in unpack_fields(view).items()}
        assert unpack_fields(memoryview(b"".join(pack_fields(fields)))) == fields
    with contextlib.suppress(struct.error, UnicodeDecodeError):
        assert all(len(inline) <= len(data) for *_, inline in unpack_references(view))


def _body_room(slot: int, length: int) -> memoryview:
    segment = _segment()
    start = segment.layout.request_payload(slot) + layout.HEAD_ROOM
    segment.memory.reserve(start, max(length, 1))
    return segment.buffer[start : start + length]
