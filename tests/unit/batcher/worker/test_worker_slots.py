"""A model worker's side of the segments."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import posix_ipc
import pytest

from wsgi_ts.batcher.shm import layout, worker_layout
from wsgi_ts.batcher.shm.layout import SegmentLayout, SegmentWord, SlotState
from wsgi_ts.batcher.shm.segment import Segment, segment_name
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.worker import slots as worker_slots
from wsgi_ts.batcher.worker.slots import WorkerSlots
from wsgi_ts.handlers.serving.results import Answer


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"wsgi-ts-{uuid.uuid4().hex}"
    yield name
    unlink_prefix(name)


def test_a_stream_that_waits_for_room_rings_once_for_what_it_has_put(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Segment.create(prefix, 1, SegmentLayout(16, 1, 100_000, 100_000))
    segment.states[3] = 1 << 8 | SlotState.RUNNING
    slots = WorkerSlots(prefix, decode_input_request=True)
    place = slots.ref(worker_layout.mail_entry(1, 3))
    assert place is not None
    rings = posix_ipc.Semaphore(f"/{segment_name(prefix, 1)}")
    segment.header[SegmentWord.ASLEEP] = 1
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 20:  # now the client reads
            words = segment.memory.words(segment.layout.slot(3) + layout.STREAM_WORDS, 2)
            words[1] = words[0]

    monkeypatch.setattr(worker_slots.time, "sleep", wait)
    # Two pieces, of which the second has no room until the first is read.
    slots.send_chunk(place, Answer(200, "", [], bytes(layout.STREAM_RING_BYTES), False), 1)
    assert len(waits) == 20
    assert rings.value == 2  # that there is a first piece, and that all is there
    assert max(waits) <= 0.008
    rings.close()
