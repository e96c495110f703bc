"""Requests and answers through a slot and back."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from wsgi_ts.batcher.shm import layout, stream
from wsgi_ts.batcher.shm.layout import SegmentLayout
from wsgi_ts.batcher.shm.request_codec import (
    Request,
    answer_range,
    read_answer,
    read_request,
    write_answer,
    write_request,
)
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix

SLOT = 3
TARGET = SimpleNamespace(model=5, url_path=b"a/b", flags=0)
ID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def segment() -> Iterator[Segment]:
    prefix = f"wsgi-ts-{uuid.uuid4().hex}"
    yield Segment.create(prefix, 1, SegmentLayout(16, 1, 100_000, 100_000))
    unlink_prefix(prefix)


@pytest.mark.parametrize("head_bytes", [30, layout.REQUEST_INLINE_BYTES, layout.REQUEST_INLINE_BYTES + 1, 8000])
@pytest.mark.parametrize("body_bytes", [0, 1, layout.REQUEST_INLINE_BYTES, 60_000])
@pytest.mark.parametrize("sequence", [b"", b"s 1"])
def test_a_request_is_read_as_it_was_written(
    segment: Segment, head_bytes: int, body_bytes: int, sequence: bytes
) -> None:
    def room(slot: int, length: int) -> memoryview:
        start = segment.layout.request_payload(slot) + layout.HEAD_ROOM
        segment.memory.reserve(start, max(length, 1))
        return segment.buffer[start : start + length]

    head, body = bytes(head_bytes), b"y" * body_bytes
    request = Request(TARGET, ID, head, b"text/plain", body, body_bytes, 7, sequence=sequence)
    is_outside = write_request(segment, SLOT, 0, request, room)
    assert is_outside == (head_bytes + 13 + len(sequence) > layout.REQUEST_INLINE_BYTES)
    request_id, _, read_head, url_path, content_type, read_body = read_request(segment, SLOT)
    assert (request_id, read_head, url_path, content_type) == (ID, head, b"a/b", b"text/plain")
    assert read_body == body
    assert segment.ids(SLOT) == (sequence.decode(), ID)
    assert segment.arrival_ns(SLOT) == 7


@pytest.mark.parametrize("body_bytes", [0, 10, layout.RESPONSE_INLINE_BYTES, 90_000])
@pytest.mark.parametrize(
    "headers", [[], [("a", "b:c"), ("d", "")], [("x", "y" * 30_000), ("z", "")], [("x", "y" * 65_529)]]
)
@pytest.mark.parametrize("phrase", ["", "Fine"])
def test_an_answer_is_read_as_it_was_written(
    segment: Segment, body_bytes: int, headers: list[tuple[str, str]], phrase: str
) -> None:
    body = b"z" * body_bytes
    write_answer(segment, SLOT, (1, 2), 201, phrase, headers, body)
    answer, held = read_answer(segment, SLOT, is_error=False)
    assert (answer.status, answer.phrase, answer.headers, answer.body) == (201, phrase, headers, body)
    assert answer.error is None
    assert answer.stream is None
    head = len(phrase) + sum(len(name) + len(value) + 2 for name, value in headers)
    outside = head if head > layout.RESPONSE_INLINE_BYTES else 0
    if body_bytes + head - outside > layout.RESPONSE_INLINE_BYTES:
        outside += body_bytes
    assert held == outside
    start, length, status, _ = answer_range(segment, SLOT)
    assert (bytes(segment.buffer[start : start + length]), status) == (body, 201)


def test_long_headers_of_a_stream_do_not_touch_its_chunks(segment: Segment) -> None:
    stream.open_ring(segment, SLOT)
    assert stream.try_push(segment, SLOT, b"chunk")
    headers = [("x", "y" * 60_000)]
    write_answer(segment, SLOT, (1, 0), 200, "", headers, None)
    answer, held = read_answer(segment, SLOT, is_error=False)
    assert (answer.headers, answer.stream) == (headers, ())
    assert held == 60_003 + layout.STREAM_RING_BYTES
    assert stream.take_chunks(segment, SLOT) == [b"chunk"]


def test_headers_beyond_the_room_for_them_are_refused_streamed_or_not(segment: Segment) -> None:
    for body in (b"", None):
        with pytest.raises(ValueError, match="65537 bytes of response headers"):
            write_answer(segment, SLOT, (1, 2), 200, "", [("x", "y" * (layout.ANSWER_HEAD_ROOM - 2))], body)


def test_chunks_come_out_as_they_went_in_round_and_round_the_ring(segment: Segment) -> None:
    stream.open_ring(segment, SLOT)
    chunk = bytes(range(256)) * 300
    for _ in range(20):
        assert not stream.has_chunks(segment, SLOT)
        count = 0
        while stream.try_push(segment, SLOT, chunk):
            count += 1
        assert count == layout.STREAM_RING_BYTES // (len(chunk) + 4)
        assert stream.take_chunks(segment, SLOT) == [chunk] * count
    pieces = list(stream.pieces_of(bytes(layout.STREAM_RING_BYTES + 1)))
    assert [len(piece) for piece in pieces] == [131072, 131072, 1]
    assert list(stream.pieces_of(b"")) == [b""]
