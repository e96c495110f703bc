"""The web side of a segment: what is news, and how models share the slots."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import ResponseFlag, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix

SLOTS = 64
HEAD = b"GET / HTTP/1.1\r\n\r\n"


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"wsgi-ts-{uuid.uuid4().hex}"
    yield name
    unlink_prefix(name)


@pytest.fixture
def client(prefix: str) -> SlotClient:
    board = Board.create(prefix)
    Doorbell.create(batcher_bell_name(prefix, 0))
    segment = Segment.create(prefix, 1, SegmentLayout(SLOTS, 1, 100_000, 300_000))
    return SlotClient(segment, board, 1, warm_bytes=0)


def submit(client: SlotClient) -> int:
    slot = client.take(0)
    assert slot is not None
    client.submit(slot, 0, Request(SimpleNamespace(model=0, url_path=b"", flags=0), "0" * 36, HEAD, b"", b"x", 1, 0))
    return slot


def stream(client: SlotClient, slot: int, chunk: bytes = b"") -> None:
    """The model worker begins a streamed answer, or adds a chunk to it."""
    segment = client.segment
    words = segment.memory.words(segment.layout.slot(slot) + layout.STREAM_WORDS, 2)
    start = segment.layout.response_payload(slot)
    segment.memory.reserve(start, layout.STREAM_RING_BYTES)
    if segment.states[slot] & 0xFF != SlotState.STREAMING:
        words[0] = words[1] = 0
        segment.write_response(
            slot, layout.RESPONSE.pack(0, 0, 0, 200, ResponseFlag.STREAMED, 0, 0), layout.NO_BATCH, b""
        )
        segment.states[slot] = segment.states[slot] & ~0xFF | SlotState.STREAMING
    if chunk:
        at = start + words[0]
        segment.buffer[at : at + 4 + len(chunk)] = len(chunk).to_bytes(4, "little") + chunk
        words[0] += 4 + len(chunk)


def end(client: SlotClient, slot: int) -> None:
    client.segment.states[slot] = client.segment.states[slot] & ~0xFF | SlotState.DONE


def test_a_stream_is_news_when_it_begins_has_chunks_or_ends(client: SlotClient) -> None:
    slot = submit(client)
    assert client.answered() == []
    stream(client, slot, b"one")
    assert client.answered() == [slot]
    assert client.answer(slot).stream is not None
    assert client.answered() == [slot]
    assert client.read_stream(slot) == [b"one"]
    assert client.answered() == []  # silent
    stream(client, slot, b"two")
    assert client.answered() == [slot]
    assert client.read_stream(slot) == [b"two"]
    end(client, slot)
    assert client.answered() == [slot]
    client.release(slot)
    assert client.answered() == []


def test_a_stream_that_nobody_waits_for_is_news_when_it_has_chunks_or_ends(client: SlotClient) -> None:
    slot = submit(client)
    client.cancel(slot)
    stream(client, slot)
    assert client.answered() == []
    stream(client, slot, b"one")
    assert client.answered() == [slot]
    client.read_stream(slot)
    assert client.answered() == []
    end(client, slot)
    assert client.answered() == [slot]
    client.release(slot)
    again = submit(client)
    assert again == slot
    stream(client, again)
    assert client.answered() == [again]  # what was said of the slot's last request does not count


def test_a_model_alone_gets_nearly_all_slots_and_the_others_get_some(client: SlotClient) -> None:
    taken = {model: 0 for model in (1, 2, 3)}
    for model in taken:
        while client.take(model) is not None:
            taken[model] += 1
    assert taken[1] >= 0.9 * SLOTS
    assert taken[2] > 0
    assert taken[3] > 0


def test_slots_that_come_back_are_shared_anew(client: SlotClient) -> None:
    slots = []
    while (slot := client.take(1)) is not None:
        slots.append(slot)
    others = []
    while (slot := client.take(2)) is not None:
        others.append(slot)
    for slot in slots:
        client.abandon(slot)
    while (slot := client.take(2)) is not None:
        others.append(slot)
    assert len(others) >= 0.9 * SLOTS


def test_shared_memory_that_does_not_go_back_costs_no_slot(client: SlotClient, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = client.take(0)
    assert slot is not None
    client.body_room(slot, 10_000)

    def refuse(offset: int, length: int) -> None:
        raise OSError("not now")

    monkeypatch.setattr(client.segment.memory, "give_back", refuse)
    client.abandon(slot)
    assert client.take(0) == slot
    assert client.in_flight == 0
