"""Slots and rings as real shared memory, used in any order by a web worker, a batcher and a model worker.

The machine keeps a model of every request, and after each step holds the memory to it: first in, first out; each
request's own bytes; no slot in two hands; what is late reaches nobody. Numbers are those of the rules in
batcher/README.md.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.segments import AttachedSegment
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import STATE_MASK, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.shm.worker_layout import mail_entry
from wsgi_ts.batcher.worker.slots import SlotReference, WorkerSlots
from wsgi_ts.handlers.serving.results import Answer

SLOTS = 8
MOST = 20_000
HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: x\r\n\r\n"
#: Around every limit of a slot.
SIZES = st.sampled_from(
    (0, 1, layout.REQUEST_INLINE_BYTES - len(HEAD), layout.REQUEST_INLINE_BYTES - len(HEAD) + 1, MOST - 1, MOST)
)
ANSWERS = st.sampled_from((0, 1, layout.RESPONSE_INLINE_BYTES, layout.RESPONSE_INLINE_BYTES + 1, MOST))
ANY = st.integers(0, 1 << 16)


def bytes_of(nonce: int, size: int) -> bytes:
    """Every byte says whose it is."""
    return (hashlib.sha256(b"%d" % nonce).digest() * (size // 32 + 1))[:size]


@dataclass(eq=False)
class Asked:
    """A request: where it lies, what it says, and who has it."""

    slot: int
    nonce: int
    body: bytes = b""
    job: Job | None = None
    ref: SlotReference | None = None
    answer: bytes | None = None
    cancelled: bool = False


class SlotMachine(RuleBasedStateMachine):
    """One web worker, one batcher, one model worker."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"wsgi-ts-{uuid.uuid4().hex}"
        board = Board.create(self.prefix)
        Doorbell.create(batcher_bell_name(self.prefix, 0))
        segment = Segment.create(self.prefix, 1, SegmentLayout(SLOTS, 1, MOST, MOST))
        self.client = SlotClient(segment, board, 1, warm_bytes=3 * MOST)
        self.batcher = AttachedSegment(self.prefix, 1, 0)
        self.worker = WorkerSlots(self.prefix, decode_input_request=True)
        self.nonce = 0
        self.writing: list[Asked] = []
        self.pushed: list[Asked] = []
        self.published: list[Asked] = []
        self.claimed: list[Asked] = []
        self.running: list[Asked] = []
        self.answered: list[Asked] = []
        self.gone: list[Job] = []

    @property
    def everywhere(self) -> list[Asked]:
        return [*self.writing, *self.pushed, *self.published, *self.claimed, *self.running, *self.answered]

    # -- the web worker

    @rule()
    def take(self) -> None:
        slot = self.client.take(0)
        if slot is None:
            assert len(self.everywhere) >= SLOTS - 2, "refused although most are free"
            return
        assert slot not in [asked.slot for asked in self.everywhere], "in two hands"
        self.nonce += 1
        self.writing.append(Asked(slot, self.nonce))

    @precondition(lambda self: self.writing)
    @rule(which=ANY, size=SIZES)
    def submit(self, which: int, size: int) -> None:
        asked = self.writing.pop(which % len(self.writing))
        asked.body = bytes_of(asked.nonce, size)
        target = SimpleNamespace(model=0, url_path=b"", flags=layout.RequestFlag.URL_PATH)
        name = str(uuid.UUID(int=asked.nonce))
        request = Request(target, name, HEAD, b"", asked.body, size, asked.nonce)
        self.client.submit(asked.slot, 0, request)
        self.pushed.append(asked)

    @precondition(lambda self: self.writing)
    @rule(which=ANY)
    def abandon(self, which: int) -> None:
        self.client.abandon(self.writing.pop(which % len(self.writing)).slot)

    @rule()
    def publish(self) -> None:
        self.client.publish()
        self.published += self.pushed
        self.pushed = []

    @precondition(lambda self: self.pushed or self.published or self.claimed or self.running)
    @rule(which=ANY)
    def hang_up(self, which: int) -> None:
        submitted = [*self.pushed, *self.published, *self.claimed, *self.running]
        asked = submitted[which % len(submitted)]
        asked.cancelled = True
        self.client.cancel(asked.slot)

    @precondition(lambda self: self.answered)
    @rule(which=ANY)
    def collect(self, which: int) -> None:
        asked = self.answered.pop(which % len(self.answered))
        answer = self.client.answer(asked.slot)
        if asked.answer is None:
            assert answer.error is not None
        else:
            assert answer.error is None
            assert answer.body == asked.answer, "another's bytes"
        self.client.release(asked.slot)
        if asked.job is not None:
            self.gone.append(asked.job)

    # -- the batcher

    @rule()
    def drain(self) -> None:
        jobs = [job for jobs in self.batcher.take_submitted(1.0).values() for job in jobs]
        assert [job.slot for job in jobs] == [asked.slot for asked in self.published], "not first in, first out"
        assert [job.arrived_ns for job in jobs] == [asked.nonce for asked in self.published]
        for asked, job in zip(self.published, jobs, strict=True):
            asked.job = job
        self.claimed += self.published
        self.published = []

    @rule()
    def replace_batcher(self) -> None:
        """A new one finds by a scan what the last one had claimed, and what was submitted; nothing is there twice."""
        self.batcher.close()
        self.batcher = AttachedSegment(self.prefix, 1, 0)
        waiting = [*self.claimed, *self.published, *self.pushed]
        found = self.batcher.scan(2.0)
        assert {each.job.slot for each in found} == {asked.slot for asked in [*waiting, *self.running]}
        jobs = {each.job.slot: each.job for each in found}
        for asked in waiting:
            asked.job = jobs[asked.slot]
        self.claimed, self.published, self.pushed = waiting, [], []
        assert not self.batcher.take_submitted(2.0), "found by the scan, and in the ring once more"
        self.client.publish()
        assert not self.batcher.take_submitted(2.0), "an entry of what the scan has found"

    @precondition(lambda self: self.claimed)
    @rule(which=ANY, status=st.sampled_from((503, 408, 499)))
    def fail(self, which: int, status: int) -> None:
        asked = self.claimed.pop(which % len(self.claimed))
        self.batcher.fail(asked.slot, status, "no", layout.NO_BATCH)
        self.answered.append(asked)

    # -- the model worker

    @precondition(lambda self: self.claimed)
    @rule(count=st.integers(1, 4))
    def run(self, count: int) -> None:
        batch, self.claimed = self.claimed[:count], self.claimed[count:]
        refs, requests = self.worker.accept([mail_entry(1, asked.slot) for asked in batch], 0)
        begun = [asked for asked in batch if not asked.cancelled]
        self.answered += [asked for asked in batch if asked.cancelled]
        assert [ref.slot for ref in refs] == [asked.slot for asked in begun]
        for asked, ref, request in zip(begun, refs, requests, strict=True):
            assert request.row["body"] == asked.body, "another's bytes"
            assert request.request_id == str(uuid.UUID(int=asked.nonce))
            ref.set_state(SlotState.RUNNING)
            asked.ref = ref
        self.running += begun

    @precondition(lambda self: self.running)
    @rule(which=ANY, size=ANSWERS, is_error=st.booleans())
    def answer(self, which: int, size: int, is_error: bool) -> None:
        asked = self.running.pop(which % len(self.running))
        assert asked.ref is not None
        body = bytes_of(~asked.nonce, size)
        status = 503 if is_error else 200
        self.worker.write(asked.ref, Answer(status, "", [], body, is_error), 1, 2)
        asked.answer = None if is_error else body
        self.answered.append(asked)

    # -- what always holds

    @invariant()
    def slots_are_where_they_should_be(self) -> None:
        states = [word & STATE_MASK for word in self.client.segment.states]
        expected = {slot: {SlotState.FREE} for slot in range(SLOTS)}
        for group, allowed in (
            (self.writing, {SlotState.WRITING}),
            (self.pushed, {SlotState.READY}),
            (self.published, {SlotState.READY}),
            (self.claimed, {SlotState.CLAIMED}),
            (self.running, {SlotState.RUNNING}),
            (self.answered, {SlotState.DONE, SlotState.FAILED}),
        ):
            for asked in group:
                assert expected[asked.slot] == {SlotState.FREE}, "in two hands"
                expected[asked.slot] = allowed
        assert all(state in expected[slot] for slot, state in enumerate(states))
        assert set(self.client.answered()) == {asked.slot for asked in self.answered}

    @invariant()
    def what_is_over_is_no_job_any_more(self) -> None:
        """Rule 5: whoever still holds a job of an earlier use of a slot sees that it is not his."""
        assert all(job.state == SlotState.FREE for job in self.gone)

    def teardown(self) -> None:
        self.batcher.close()
        unlink_prefix(self.prefix)


SlotMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestSlots = SlotMachine.TestCase
