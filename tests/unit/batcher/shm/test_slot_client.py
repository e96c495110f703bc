"""The web side of a segment: what is news, and how models share the slots."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import ResponseFlag, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.request_codec import Request, write_answer
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
        header = layout.RESPONSE.pack(0, 0, 0, 200, ResponseFlag.STREAMED, 0, 0, segment.generation(slot))
        segment.write_response(slot, header, layout.NO_BATCH, b"")
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


# What a handler's stray write does to the words of states


def answer(client: SlotClient, slot: int, body: bytes) -> None:
    """A model worker answers."""
    write_answer(client.segment, slot, (1, 2), 200, "", [], body)
    end(client, slot)


def told(client: SlotClient, slot: int) -> tuple[int, str]:
    """The status, and the error's text or the body, of the answer in a slot of which there is news."""
    assert client.answered() == [slot]
    found = client.answer(slot)
    if found.error is not None:
        return found.error.status, found.error.message
    return found.status, str(found.body, "ascii")


LOST = (500, "The answer was damaged in shared memory")


@pytest.mark.parametrize(
    "write",
    [
        lambda word: word & ~0xFF | SlotState.DONE,
        lambda word: word & ~0xFF | SlotState.FAILED,
        lambda word: word & ~0xFF | SlotState.STREAMING,
        lambda word: word & ~0xFF | 0xFF,
        lambda word: word + 256 & ~0xFF | SlotState.DONE,
        lambda word: (1 << 64) - 1,
        lambda word: SlotState.DONE,
    ],
    ids=["done", "failed", "streaming", "no state", "another generation", "ones", "no generation"],
)
def test_the_answer_to_an_earlier_request_is_none(client: SlotClient, write: Callable[[int], int]) -> None:
    slot = submit(client)
    answer(client, slot, b"earlier")
    assert told(client, slot) == (200, "earlier")
    client.release(slot)
    assert submit(client) == slot
    client.segment.states[slot] = write(client.segment.states[slot])
    assert told(client, slot) == LOST
    assert not client.may_use(slot)
    client.release(slot)
    assert client.in_flight == 0
    # Its model worker may still write there, so that no other request may be there.
    taken = [client.take(model) for model in range(SLOTS)]
    assert slot not in taken
    assert taken.count(None) == 1


def test_one_that_nobody_would_answer_is_found(client: SlotClient) -> None:
    slot = submit(client)
    client.segment.states[slot] = 0
    assert client.answered() == []
    client.look_over()
    assert told(client, slot) == LOST


@pytest.mark.parametrize("word", [SlotState.DONE, SlotState.STREAMING, (1 << 64) - 1])
def test_a_slot_without_a_request_is_given_to_one_alone(client: SlotClient, word: int) -> None:
    """Free, being written and being sent slots are no news, and are not given back a second time."""
    free, sending, writing, other = submit(client), submit(client), client.take(0), submit(client)
    assert writing is not None
    for slot in (free, sending):
        answer(client, slot, b"body")
    assert client.answered() == [free, sending]
    client.release(free)
    client.keep_for_sending(sending)
    for slot in (free, sending, writing):
        client.segment.states[slot] = word
    assert client.answered() == []
    answer(client, other, b"other")
    assert told(client, other) == (200, "other")
    for slot in (sending, other):
        client.release(slot)
    client.abandon(writing)
    taken = [slot for slot in (client.take(model) for model in range(2 * SLOTS)) if slot is not None]
    assert sorted(taken) == list(range(SLOTS))
