"""Streams of an asynchronous handler whose clients do not read: what waits for all of them has one limit."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator

import pytest

from wsgi_ts.batcher.shm import worker_layout
from wsgi_ts.batcher.shm.layout import STREAM_RING_BYTES, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.worker import async_worker
from wsgi_ts.batcher.worker.async_worker import Backlog, RunningRequest
from wsgi_ts.batcher.worker.slots import WorkerSlots
from wsgi_ts.handlers.serving.results import Answer


@pytest.fixture
def segment() -> Iterator[Segment]:
    name = f"wsgi-ts-{uuid.uuid4().hex}"
    yield Segment.create(name, 1, SegmentLayout(16, 1, 100_000, 100_000))
    unlink_prefix(name)


def exchange(segment: Segment, slots: WorkerSlots, slot: int, backlog: Backlog) -> RunningRequest:
    segment.states[slot] = 1 << 8 | SlotState.RUNNING
    place = slots.ref(worker_layout.mail_entry(1, slot))
    assert place is not None
    return RunningRequest(slots, place, 1, backlog)


def test_what_waits_for_slow_clients_has_one_limit(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_worker, "MOST_WAITING", 3 * STREAM_RING_BYTES)
    slots, backlog = WorkerSlots(segment.memory.name.rpartition("-s")[0], decode_input_request=True), Backlog()
    slow, other, quick = (exchange(segment, slots, slot, backlog) for slot in (1, 2, 3))
    chunk = bytes(STREAM_RING_BYTES)
    for each in (slow, slow, slow, other):
        each.send(0, 200, "", [], chunk)
    other.send(0, 200, "", [], chunk)  # what waits of it is not refused while all is below the limit
    for each in (slow, other):
        with pytest.raises(BufferError, match="answers wait for clients that read too slowly"):
            each.send(0, 200, "", [], chunk)
    quick.send(0, 200, "", [], b"a client that keeps up")
    held = backlog.held
    assert 3 * STREAM_RING_BYTES < held < 5 * STREAM_RING_BYTES
    segment.cancels[1] = 1
    asyncio.run(slow.end(Answer(500, "", [], b"", True)))
    assert 0 < backlog.held < held - STREAM_RING_BYTES
    other.send(0, 200, "", [], b"there is room again")
