"""A process that dies in the middle of a hand-over, after any bytecode of it: the others see all of it, or nothing.

A forked child does one operation on a real segment, and kills itself after the n-th bytecode, for every n. Then this
process, in the place of the others, takes over what is there.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import wsgi_ts
from wsgi_ts.batcher.scheduler.segments import AttachedSegment
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import STATE_MASK, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.request_codec import Request, read_answer, read_request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.shm.worker_layout import mail_entry
from wsgi_ts.batcher.worker.slots import WorkerSlots
from wsgi_ts.handlers.serving.results import Answer

pytestmark = pytest.mark.skipif(
    bool(wsgi_ts.compiled_modules.modules), reason="compiled modules have no bytecodes (WSGI_TS_COMPILED=0)"
)

SLOTS = 4
BODY = bytes(range(256)) * 20
ANSWER = BODY[::-1]
ID = "00000000-0000-4000-8000-000000000000"
#: More than any of the operations has.
MOST_BYTECODES = 5000
#: Of the longer operations every so many bytecodes; a step that shares no factor with loops of theirs.
STEP = 7


class Place:
    """A segment with one request on its way, and what a new process attaches to it."""

    def __init__(self) -> None:
        self.prefix = f"wsgi-ts-{uuid.uuid4().hex}"
        self.board = Board.create(self.prefix)
        Doorbell.create(batcher_bell_name(self.prefix, 0))
        self.segment = Segment.create(self.prefix, 1, SegmentLayout(SLOTS, 1, 10_000, 10_000))
        self.client = SlotClient(self.segment, self.board, 1, warm_bytes=0)
        self.batcher = AttachedSegment(self.prefix, 1, 0)

    def state(self, slot: int) -> int:
        return self.segment.states[slot] & STATE_MASK

    def submit(self, slot: int) -> None:
        target = SimpleNamespace(model=0, url_path=b"", flags=0)
        self.client.submit(slot, 0, Request(target, ID, b"GET / HTTP/1.1\r\n\r\n", b"", BODY, len(BODY), 7))
        self.client.publish()

    def claim(self) -> None:
        assert self.batcher.take_submitted(1.0)

    def write_answer(self) -> None:
        worker = WorkerSlots(self.prefix, decode_input_request=True)
        refs, _ = worker.accept([mail_entry(1, slot) for slot in range(SLOTS) if self.state(slot) != 0], 0)
        for ref in refs:
            ref.set_state(SlotState.RUNNING)
            worker.write(ref, Answer(200, "", [], ANSWER), 1, 2)


@pytest.fixture
def places() -> Iterator[Callable[[], Place]]:
    made: list[Place] = []

    def make() -> Place:
        made.append(Place())
        return made[-1]

    yield make
    for place in made:
        unlink_prefix(place.prefix)


def dies_at(number: int, operation: Callable[[], Any]) -> bool:
    """Does the operation in a child that dies after so many bytecodes; returns whether it came to that."""
    child = os.fork()
    if not child:
        left = number

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            operation()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def every_death(operation: Callable[[], Any], check: Callable[[bool], None], reset: Callable[[], None]) -> None:
    for number in range(0, MOST_BYTECODES, STEP):
        reset()
        died = dies_at(number, operation)
        check(died)
        if not died:
            assert number > 3 * STEP, "nothing was traced"
            return
    raise AssertionError(f"the operation has more than {MOST_BYTECODES} bytecodes")


@pytest.mark.slow
def test_a_web_worker_dies_while_it_submits(places: Callable[[], Place]) -> None:
    seen = set()
    place = places()
    slot = -1

    def reset() -> None:
        nonlocal slot, place
        place.segment.states[max(slot, 0)] = 0
        place.batcher.ring.skip_all()
        taken = place.client.take(0)
        assert taken is not None
        slot = taken
        place.client._free.append(slot)
        place.client._held[0] -= 1

    def check(died: bool) -> None:
        state = place.state(slot)
        assert state in (SlotState.WRITING, SlotState.READY)
        seen.add(state)
        found = place.batcher.scan(1.0)
        assert [each.job.slot for each in found] == ([slot] if state == SlotState.READY else [])
        if state == SlotState.READY:
            request_id, _, head, _, _, body = read_request(place.segment, slot)
            assert (request_id, head, body) == (ID, b"GET / HTTP/1.1\r\n\r\n", BODY), "half of it"
        else:
            assert died
        place.batcher.take_submitted(1.0)

    every_death(lambda: place.submit(slot), check, reset)
    assert seen == {SlotState.WRITING, SlotState.READY}


@pytest.mark.slow
def test_a_batcher_dies_while_it_claims(places: Callable[[], Place]) -> None:
    seen = set()
    place = places()
    slot = place.client.take(0)
    assert slot is not None

    def reset() -> None:
        place.segment.states[slot] = 1 << layout.GENERATION_SHIFT | SlotState.WRITING
        place.batcher.close()
        place.batcher = AttachedSegment(place.prefix, 1, 0)
        place.submit(slot)
        place.client.in_flight = 0

    def check(_: bool) -> None:
        state = place.state(slot)
        assert state in (SlotState.READY, SlotState.CLAIMED)
        seen.add(state)
        successor = AttachedSegment(place.prefix, 1, 0)
        assert [(each.job.slot, each.state) for each in successor.scan(2.0)] == [(slot, state)]
        assert not successor.take_submitted(2.0), "twice"
        assert read_request(place.segment, slot)[5] == BODY
        successor.close()

    every_death(place.claim, check, reset)
    assert seen == {SlotState.READY, SlotState.CLAIMED}


@pytest.mark.slow
def test_a_model_worker_dies_while_it_answers(places: Callable[[], Place]) -> None:
    seen = set()
    place = places()
    slot = place.client.take(0)
    assert slot is not None
    place.submit(slot)

    def reset() -> None:
        place.segment.states[slot] = 1 << layout.GENERATION_SHIFT | SlotState.CLAIMED

    def check(_: bool) -> None:
        state = place.state(slot)
        seen.add(state)
        assert state in (SlotState.CLAIMED, SlotState.RUNNING, SlotState.DONE)
        if state == SlotState.DONE:
            answer, _held = read_answer(place.segment, slot, is_error=False)
            assert (answer.status, answer.body) == (200, ANSWER), "half of it"
        else:
            assert read_request(place.segment, slot)[5] == BODY, "it could not run again, or be answered"

    every_death(place.write_answer, check, reset)
    assert seen == {SlotState.CLAIMED, SlotState.RUNNING, SlotState.DONE}
