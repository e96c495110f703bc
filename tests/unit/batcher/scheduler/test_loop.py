"""The way of slots between web worker, batcher loop and model worker, all three in one process.

The test plays the model worker by hand, so that it can stop, or die, between any two steps. Numbers in the names are
those of the rules in batcher/README.md.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from wsgi_ts.batcher.scheduler.loop import BatcherLoop, Notice, SettleWorker, TakeModel, TakeWorker
from wsgi_ts.batcher.scheduler.model_queue import Worker
from wsgi_ts.batcher.shm import layout, worker_layout
from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import BatcherWord, ModelWord, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.mailbox import BatcherMailbox, WorkerMailbox, mailbox_name
from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.shm.worker_layout import MailWord, mark_of
from wsgi_ts.messages import (
    AttachSegment,
    KillWorker,
    ModelSpec,
    ReleaseWorker,
    RetireSegment,
    SegmentRetired,
    UnloadModel,
    WorkerReleased,
)

HEAD = b"POST /predictions/m HTTP/1.1\r\n\r\n"
REQUEST_ID = "00000000-0000-4000-8000-000000000000"
MODEL = 5
TARGET = SimpleNamespace(model=MODEL, url_path=b"", flags=0)
WORKER = 9000


class Bench:
    """One segment, one batcher loop, and mailboxes whose worker side the test plays."""

    def __init__(self, prefix: str, **spec: Any) -> None:
        self.prefix = prefix
        self.arrived_ns = 0
        self.spec = ModelSpec(
            **{
                "index": MODEL,
                "name": "m",
                "version": "1.0",
                "model_dir": "/",
                "handler": "h",
                "manifest": None,
                "batch_policy": "none",
                **spec,
            }
        )
        self.board = Board.create(prefix)
        Doorbell.create(batcher_bell_name(prefix, 0))
        self.segment = Segment.create(prefix, 1, SegmentLayout(16, 1, 100_000, 100_000))
        self.client = SlotClient(self.segment, self.board, 1, warm_bytes=50_000)
        self.holders = itertools.count()
        self.notices: list[Notice] = []
        self.loop = self.new_loop()
        self.loop.command(TakeModel(self.spec))
        self.turn()

    def new_loop(self) -> BatcherLoop:
        loop = BatcherLoop(self.board, 0, self.notices.append)
        loop.command(AttachSegment(1))
        return loop

    def turn(self) -> None:
        while self.loop.turn():
            pass

    def lose_worker(self, ours: BatcherMailbox, *, oom: bool = False) -> None:
        """A model worker's process ends."""
        self.loop.command(SettleWorker(ours, oom))
        self.turn()

    def add_worker(self, worker_id: int = WORKER) -> tuple[BatcherMailbox, WorkerMailbox]:
        name = mailbox_name(self.prefix, 0, worker_id, 1)
        ours = BatcherMailbox(name, max(1, self.spec.batch_size))
        self.loop.command(TakeWorker(Worker(worker_id, 1, MODEL, ours.capacity), ours))
        self.turn()
        return ours, WorkerMailbox(name)

    def submit(self, body: bytes = b"x", sequence: bytes = b"") -> int:
        slot = self.take()
        assert slot is not None
        self.arrived_ns += 1
        arrived_ns = self.arrived_ns
        self.push(slot, arrived_ns, body, sequence)
        self.client.publish()
        self.turn()
        return slot

    def push(self, slot: int, arrived_ns: int, body: bytes = b"x", sequence: bytes = b"", batcher: int = 0) -> None:
        """The web worker submits a request that it has not yet published."""
        request = Request(TARGET, REQUEST_ID, HEAD, b"", body, len(body), arrived_ns, sequence=sequence)
        self.client.submit(slot, batcher, request)

    def take_all(self) -> list[int]:
        """All free slots, none of which has been submitted."""
        return list(iter(self.take, None))

    def take(self) -> int | None:
        """A free slot, the last one as well: nothing is kept back from a model that has none yet."""
        return self.client.take(next(self.holders))

    def replace_loop(self) -> None:
        """The batcher is killed, and the next one takes its place."""
        self.loop = self.new_loop()
        self.loop.command(TakeModel(self.spec))
        self.turn()

    def state(self, slot: int) -> int:
        return self.client.state(slot)

    def begin(self, worker: WorkerMailbox, number: int) -> list[int]:
        """The model worker takes a batch and calls the handler."""
        entries = worker.begin(number, 1)
        assert entries is not None
        slots = [entry & 0xFFFFFFFF for entry in entries]
        for slot in slots:
            self.segment.states[slot] = self.segment.states[slot] & ~0xFF | SlotState.RUNNING
        return slots

    def finish(self, worker: WorkerMailbox, number: int, slots: list[int]) -> None:
        for slot in slots:
            self.segment.fail(slot, 418, "answered")
        worker.finish(number, 1000)
        self.turn()

    def join(self, worker: WorkerMailbox, number: int) -> list[int]:
        """The model worker lets what was dispatched join its continuous batch."""
        slots = [entry & 0xFFFFFFFF for entry in worker.take_over(number)]
        for slot in slots:
            self.segment.states[slot] = self.segment.states[slot] & ~0xFF | SlotState.RUNNING
        self.turn()
        return slots

    def end(self, worker: WorkerMailbox, slot: int) -> None:
        """A request leaves the continuous batch; the loop has not looked yet."""
        self.segment.fail(slot, 418, "answered")
        worker.add_finished(1)

    def outstanding(self) -> int:
        return self.board.words[self.board.model_row(0, MODEL) + ModelWord.OUTSTANDING]

    def is_unloaded(self) -> bool:
        """Whether the loop knows the model no more; nothing is left of it that describes the present."""
        row = self.board.model_row(0, MODEL)
        gauges = [self.board.words[row + word] for word in (ModelWord.READY_WORKERS, ModelWord.OUTSTANDING)]
        return MODEL not in self.loop._scheduler.models and not any(gauges)

    def status(self, slot: int) -> int:
        return self.client.answer(slot).status


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"wsgi-ts-{uuid.uuid4().hex}"
    yield name
    unlink_prefix(name)


@pytest.fixture
def bench(prefix: str) -> Bench:
    return Bench(prefix)


def test_a_request_goes_through_all_states(bench: Bench) -> None:
    _, worker = bench.add_worker()
    slot = bench.submit()
    assert bench.state(slot) == SlotState.CLAIMED
    slots = bench.begin(worker, 1)
    assert slots == [slot]
    bench.finish(worker, 1, slots)
    assert bench.client.answered() == [slot]
    assert bench.status(slot) == 418
    bench.client.release(slot)
    assert bench.state(slot) == SlotState.FREE
    assert bench.client.in_flight == 0


def test_the_loop_tells_that_it_sleeps_only_when_all_news_are_counted(bench: Bench) -> None:
    words, sleeps = bench.board.words, bench.board.batcher_row(0) + BatcherWord.SLEEPS
    _, worker = bench.add_worker()
    slot = bench.submit()
    bench.begin(worker, 1)
    bench.segment.fail(slot, 418, "answered")
    worker.finish(1, 1000)
    before = words[sleeps]
    bench.loop.sleep()
    assert words[sleeps] == before
    bench.turn()
    assert words[bench.board.model_row(0, MODEL) + ModelWord.BATCHES] == 1
    bench.loop.sleep()
    assert words[sleeps] > before


def test_jobs_wait_for_the_first_worker(bench: Bench) -> None:
    slots = [bench.submit() for _ in range(3)]
    assert [bench.state(slot) for slot in slots] == [SlotState.CLAIMED] * 3
    _, worker = bench.add_worker()
    assert bench.begin(worker, 1) == slots[:1]


def test_what_waits_and_what_runs_is_shown_at_each_step(prefix: str) -> None:
    bench = Bench(prefix, job_queue_size=2)
    _, worker = bench.add_worker()
    bench.loop._next_tick = math.inf  # the work of each tick comes too late for who asks after each request

    def shown() -> tuple[int, int, bool]:
        words, row = bench.board.words, bench.board.model_row(0, MODEL)
        return bench.outstanding(), words[row + ModelWord.QUEUED], words[row + ModelWord.OLDEST_NS] > 0

    bench.submit()
    assert shown() == (1, 0, False)
    for _ in range(2):
        bench.submit()
    assert shown() == (3, 2, True)
    bench.submit()  # more than the queue holds
    assert shown() == (3, 2, True)
    bench.finish(worker, 1, bench.begin(worker, 1))
    assert shown() == (2, 0, False)  # the handler is quick: both lie ready in the mailbox


def test_a_full_queue_refuses_at_once(prefix: str) -> None:
    bench = Bench(prefix, job_queue_size=2)
    slots = [bench.submit() for _ in range(3)]
    assert bench.state(slots[2]) == SlotState.FAILED
    assert bench.status(slots[2]) == 503
    assert bench.state(slots[0]) == SlotState.CLAIMED


def test_the_kv_caches_of_the_workers_that_live_are_summed_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.batcher.scheduler.scheduler.LAST_ARRIVALS_S", 0.0)

    def shown() -> list[int]:
        bench.loop._next_tick = 0.0
        bench.turn()
        row = bench.board.model_row(0, MODEL)
        return [bench.board.words[row + word] for word in (ModelWord.KV_CACHE, ModelWord.KV_CACHE_WORKERS)]

    (ours, worker), (_, other), _ = [bench.add_worker(WORKER + life) for life in range(3)]
    assert shown() == [0, 0]
    worker.show_kv_cache(0.25)
    other.show_kv_cache(0.0)
    assert shown() == [250_000, 2]
    other.show_kv_cache(1.0)
    assert shown() == [1_250_000, 2]
    bench.lose_worker(ours)
    assert shown() == [1_000_000, 1]
    for command in (UnloadModel(MODEL), *(ReleaseWorker(WORKER + life, 1) for life in (2, 1))):
        bench.loop.command(command)
    assert shown() == [0, 0]
    assert bench.is_unloaded()


def test_rule_3_what_a_dead_worker_had_begun_fails_and_the_rest_is_queued_again(prefix: str) -> None:
    bench = Bench(prefix, batch_size=2)
    ours, worker = bench.add_worker()
    begun = bench.submit()
    waiting = bench.submit()
    assert bench.begin(worker, 1) == [begun]
    bench.loop.command(SettleWorker(ours))
    bench.turn()
    assert bench.state(begun) == SlotState.FAILED
    assert bench.status(begun) == 500
    assert bench.state(waiting) == SlotState.CLAIMED
    _, successor = bench.add_worker(9001)
    assert bench.begin(successor, 1) == [waiting]


def test_rule_3_a_worker_killed_between_taking_and_running_loses_nothing(bench: Bench) -> None:
    ours, worker = bench.add_worker()
    slot = bench.submit()
    assert worker.begin(1, 1) is not None  # it dies here: the handler was not called
    bench.loop.command(SettleWorker(ours))
    bench.turn()
    _, successor = bench.add_worker(9001)
    assert bench.begin(successor, 1) == [slot]


def test_rule_3_a_request_that_ends_its_workers_before_they_begin_it_is_given_up(bench: Bench) -> None:
    slot = bench.submit()
    for worker_id in range(9000, 9003):
        assert bench.state(slot) == SlotState.CLAIMED
        ours, worker = bench.add_worker(worker_id)
        assert worker.begin(1, 1) is not None  # it dies while it reads the request
        bench.lose_worker(ours)
    answer = bench.client.answer(slot)
    assert answer.status == 500
    assert bytes(answer.body).decode().startswith("Worker died. 3 workers ended before they had read this request")


def test_rule_3_of_a_batch_whose_worker_ended_each_request_goes_alone(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4)
    slots = [bench.submit() for _ in range(3)]
    ours, worker = bench.add_worker(9000)
    assert worker.begin(1, 1) is not None
    bench.lose_worker(ours)
    later = bench.submit()
    for worker_id, slot in enumerate(slots, 9001):
        ours, worker = bench.add_worker(worker_id)
        assert bench.begin(worker, 1) == [slot]
        bench.finish(worker, 1, [slot])
        # Leaves without taking the next one; that it was idle is not held against anybody.
        bench.lose_worker(ours)
    ours, worker = bench.add_worker(9005)
    assert bench.begin(worker, 1) == [later]
    assert [bench.status(slot) for slot in slots] == [418] * 3


def test_requests_that_wait_again_do_not_wait_for_others(prefix: str) -> None:
    bench = Bench(prefix, batch_size=3, batch_policy="fixed", max_batch_delay_ms=3_600_000)
    slots = [bench.submit() for _ in range(3)]
    ours, worker = bench.add_worker(9000)
    assert worker.begin(1, 1) is not None
    bench.lose_worker(ours)
    _, worker = bench.add_worker(9001)
    for number, slot in enumerate(slots, 1):
        assert bench.begin(worker, number) == [slot]
        bench.finish(worker, number, [slot])
    bench.submit()
    assert worker.posted() == 3, "one that is new waits for others"


def test_rule_3_what_lies_behind_the_batch_of_a_dead_worker_is_no_suspect(bench: Bench) -> None:
    bench.loop._scheduler.models[MODEL].service_s = 0.001  # short batches are dispatched ahead
    ours, worker = bench.add_worker()
    running, behind = bench.submit(), bench.submit()
    assert (bench.begin(worker, 1), worker.posted()) == ([running], 2)
    bench.lose_worker(ours)
    (job,) = bench.loop._scheduler.models[MODEL].jobs.take(1)
    assert (job.slot, job.state, job.deliveries) == (behind, SlotState.CLAIMED, 0)


def test_rule_3_holds_for_what_joins_a_continuous_batch(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True)
    slot = bench.submit()
    for worker_id in range(9000, 9003):
        ours, worker = bench.add_worker(worker_id)
        worker.take_over(1)
        bench.lose_worker(ours, oom=True)
    assert bench.status(slot) == 507


def test_the_next_request_in_the_slot_of_a_suspect_is_none(prefix: str) -> None:
    bench = Bench(prefix, batch_size=2)
    slot = bench.submit()
    ours, worker = bench.add_worker()
    worker.begin(1, 1)
    bench.lose_worker(ours)
    bench.client.cancel(slot)
    bench.loop._next_tick = 0.0
    bench.turn()
    assert bench.status(slot) == 499
    bench.client.release(slot)
    slots = [bench.submit(), bench.submit()]
    assert slot in slots
    _, worker = bench.add_worker(9001)
    assert bench.begin(worker, 1) == slots


@pytest.mark.parametrize("is_running", [False, True])
def test_a_worker_that_dies_after_its_answer_harms_no_next_request_in_the_same_slot(
    bench: Bench, is_running: bool
) -> None:
    ours, worker = bench.add_worker()
    slot = bench.submit()
    assert bench.begin(worker, 1) == [slot]
    bench.segment.fail(slot, 418, "answered")  # and the worker has not yet said that its batch is done
    bench.client.release(slot)
    others, other = bench.add_worker(9001)
    assert bench.submit() == slot
    if is_running:
        assert bench.begin(other, 1) == [slot]
    bench.lose_worker(ours)
    assert bench.state(slot) == (SlotState.RUNNING if is_running else SlotState.CLAIMED)
    if not is_running:
        assert bench.begin(other, 1) == [slot]
    bench.finish(other, 1, [slot])
    assert bench.status(slot) == 418
    assert others.posted == 1, "dispatched twice"


def test_requests_of_one_slot_are_told_apart_by_generation_though_they_arrived_at_one_time(bench: Bench) -> None:
    ours, worker = bench.add_worker()
    first = bench.client.take()
    assert first is not None
    bench.push(first, 7)
    bench.client.publish()
    bench.turn()
    assert bench.begin(worker, 1) == [first]
    bench.segment.fail(first, 418, "answered")  # the batch is not done yet
    bench.client.release(first)
    again = bench.client.take()
    assert again == first
    bench.push(again, 7)  # in the same turn of the web worker's loop: of the same time
    bench.client.publish()
    bench.turn()
    assert bench.state(again) == SlotState.CLAIMED
    bench.lose_worker(ours)
    others, successor = bench.add_worker(9001)
    assert bench.begin(successor, 1) == [again]
    bench.finish(successor, 1, [again])
    assert others.posted == 1, "dispatched twice"


def test_a_worker_that_does_not_take_its_batch_is_reported(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.batcher.scheduler.model_queue.UNTAKEN_MARGIN_S", -1.0)
    bench = Bench(prefix, response_timeout_s=0.0)
    bench.add_worker()
    bench.submit()
    for _ in range(2):
        bench.loop._next_tick = 0.0
        bench.turn()
    assert bench.notices.count(KillWorker(WORKER, 1)) == 1


def test_a_worker_out_of_memory_is_answered_507(bench: Bench) -> None:
    ours, worker = bench.add_worker()
    slot = bench.submit()
    bench.begin(worker, 1)
    bench.loop.command(SettleWorker(ours, oom=True))
    bench.turn()
    assert bench.status(slot) == 507


def test_rule_5_a_stale_ring_entry_is_ignored(bench: Bench) -> None:
    slot = bench.client.take()
    assert slot is not None
    ring = bench.client._rings[0]
    ring.push(slot, MODEL, 77, 0)  # a generation that the slot never had
    ring.publish()
    bench.turn()
    assert bench.state(slot) == SlotState.WRITING


def test_a_cancelled_request_is_never_given_to_a_worker(bench: Bench) -> None:
    slot = bench.submit()
    bench.client.cancel(slot)
    kept = bench.submit()
    _, worker = bench.add_worker()
    assert bench.begin(worker, 1) == [kept]
    assert bench.status(slot) == 499


def test_a_worker_knows_how_many_beside_it_have_something_to_do(prefix: str) -> None:
    bench = Bench(prefix)
    (_, first), (_, second) = bench.add_worker(), bench.add_worker(WORKER + 1)
    bench.submit()
    bench.submit()
    bench.turn()
    assert sorted(worker.busy for worker in (first, second)) == [1, 2]


def test_rule_10_a_revoked_batch_is_skipped_and_queued_again(prefix: str) -> None:
    bench = Bench(prefix)
    ours, worker = bench.add_worker()
    first = bench.submit()
    assert bench.begin(worker, 1) == [first]
    numbers = [ours.post([1 << 32 | slot]) for slot in (3, 4, 5)]
    assert ours.revoke(numbers[1]) == 1
    after = ours.post([1 << 32 | 6])
    begun = [worker.begin(number, 1) for number in (*numbers, after)]
    assert begun == [[1 << 32 | 3], None, None, [1 << 32 | 6]]


def test_rule_10_a_batch_that_was_begun_cannot_be_taken_back(bench: Bench) -> None:
    ours, worker = bench.add_worker()
    bench.submit()
    bench.begin(worker, 1)
    assert ours.revoke(1) == 1


def test_the_next_batcher_finds_what_the_last_one_left(bench: Bench) -> None:
    ours, worker = bench.add_worker()
    running = bench.submit()
    claimed = bench.submit()
    bench.begin(worker, 1)
    del ours
    ready = bench.client.take()
    assert ready is not None
    bench.client.submit(ready, 0, Request(TARGET, REQUEST_ID, HEAD, b"", b"x", 1, arrival_ns=1))
    bench.client.publish()  # the batcher is killed before it sees this one
    bench.loop = bench.new_loop()
    bench.turn()
    bench.loop.command(TakeModel(bench.spec))
    bench.turn()
    assert bench.state(running) == SlotState.FAILED
    assert bench.status(running) == 500
    _, successor = bench.add_worker(9001)
    assert bench.begin(successor, 1) == [claimed]
    bench.finish(successor, 1, [claimed])
    assert bench.begin(successor, 2) == [ready]


def test_the_next_batcher_of_an_overloaded_one_answers_all(prefix: str) -> None:
    bench = Bench(prefix, job_queue_size=11)
    slots = [bench.submit() for _ in range(16)]
    refused = [slot for slot in slots if bench.state(slot) == SlotState.FAILED]
    assert len(refused) == 5
    for slot in refused:
        bench.client.release(slot)
    # The batcher is killed; the same five slots are submitted again. 21 entries were pushed by now, for 16 slots.
    for arrived_ns, slot in enumerate(bench.take_all(), 100):
        bench.push(slot, arrived_ns)
    bench.client.publish()
    assert bench.client._rings[0]._tail == 21
    bench.replace_loop()
    # What the first batcher had let in waits again, in order; for the rest the queue has no room.
    assert [bench.status(slot) for slot in refused] == [503] * 5
    _, worker = bench.add_worker()
    for number, slot in enumerate(slots[:11], 1):
        assert bench.begin(worker, number) == [slot]
        bench.finish(worker, number, [slot])
    for slot in slots:
        bench.client.release(slot)
    after = bench.submit()
    assert bench.begin(worker, 12) == [after]


@pytest.mark.parametrize("is_published", [False, True])
def test_a_request_that_the_scan_finds_is_queued_once(bench: Bench, is_published: bool) -> None:
    slot, later = bench.client.take(), bench.client.take()
    assert slot is not None
    assert later is not None
    bench.push(slot, 1)
    if is_published:
        bench.client.publish()
    bench.replace_loop()
    assert (bench.state(slot), bench.state(later)) == (SlotState.CLAIMED, SlotState.WRITING)
    bench.push(later, 2)
    bench.client.publish()
    _, worker = bench.add_worker()
    for number, each in enumerate([slot, later], 1):
        assert bench.begin(worker, number) == [each]
        bench.finish(worker, number, [each])
    assert worker.posted() == 2
    row = bench.board.model_row(0, MODEL)
    assert bench.board.words[row + ModelWord.REQUESTS] == 2


def test_requests_that_the_scan_finds_are_queued_as_they_arrived(prefix: str) -> None:
    bench = Bench(prefix, batch_size=16)
    slots = bench.take_all()
    for number, slot in enumerate(slots):
        bench.push(slot, 1000 - number)
    bench.client.publish()
    gone = slots[3]
    bench.client.cancel(gone)
    bench.replace_loop()
    _, worker = bench.add_worker()
    assert bench.begin(worker, 1) == [slot for slot in reversed(slots) if slot != gone]
    assert bench.status(gone) == 499


def test_the_scan_leaves_other_batchers_requests_alone(bench: Bench) -> None:
    ours, other = bench.client.take(), bench.client.take()
    assert ours is not None
    assert other is not None
    bench.push(ours, 1)
    bench.push(other, 2, batcher=0)
    start = bench.segment.layout.slot(other)
    fields = list(layout.REQUEST.unpack_from(bench.segment.buffer, start))
    fields[7] = 1
    layout.REQUEST.pack_into(bench.segment.buffer, start, *fields)
    bench.replace_loop()
    assert (bench.state(ours), bench.state(other)) == (SlotState.CLAIMED, SlotState.READY)


def test_a_ring_is_not_overrun_by_requests_that_the_scan_was_quicker_than(bench: Bench) -> None:
    slots = bench.take_all()
    for slot in slots:
        bench.push(slot, 1)
    bench.loop = bench.new_loop()  # which finds them all before they are published
    bench.loop._attach(1, 0.0)
    bench.loop._commands.clear()
    bench.loop._act(bench.loop._scheduler.tick(math.inf), math.inf)
    for slot in slots:
        assert bench.status(slot) == 503
        bench.client.release(slot)
    again = bench.take_all()
    for slot in again:
        bench.push(slot, 2)
    bench.client.publish()
    bench.loop.command(TakeModel(bench.spec))
    bench.turn()
    assert [bench.state(slot) for slot in again] == [SlotState.CLAIMED] * 16


def test_what_a_damaged_ring_does_not_tell_is_found_by_a_scan(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    slot = bench.client.take()
    assert slot is not None
    bench.push(slot, 1)
    bench.client._rings[0]._tail_word[0] = 10_000
    bench.turn()
    assert bench.state(slot) == SlotState.CLAIMED
    assert "The ring of segment 1 is damaged: 10000 entries in a ring of 32" in caplog.text


def test_a_retired_segment_is_let_go_when_nothing_runs_into_it(bench: Bench) -> None:
    _, worker = bench.add_worker()
    slots = [bench.submit(), bench.submit()]
    bench.begin(worker, 1)
    bench.loop.command(RetireSegment(1))
    bench.turn()
    assert SegmentRetired(1) not in bench.notices
    bench.finish(worker, 1, slots[:1])
    assert SegmentRetired(1) in bench.notices
    assert worker.posted() == 1  # the queued one was dropped


def test_an_unloaded_model_answers_what_is_queued(bench: Bench) -> None:
    slot = bench.submit()
    bench.loop.command(UnloadModel(MODEL))
    bench.turn()
    assert bench.status(slot) == 503
    assert bench.is_unloaded()


def test_an_unloaded_model_serves_what_is_queued_before_its_worker_leaves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_ts.batcher.scheduler.scheduler.LAST_ARRIVALS_S", 0.0)
    _, worker = bench.add_worker()
    slots = [bench.submit(), bench.submit()]
    bench.begin(worker, 1)
    bench.loop.command(UnloadModel(MODEL))
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.turn()
    assert not worker.stopping
    bench.finish(worker, 1, slots[:1])
    bench.begin(worker, 2)
    bench.finish(worker, 2, slots[1:])
    assert [bench.status(slot) for slot in slots] == [418, 418]
    assert worker.stopping
    assert bench.is_unloaded()


def test_an_unloaded_model_still_takes_jobs_that_were_on_their_way(bench: Bench) -> None:
    _, worker = bench.add_worker()
    bench.loop.command(UnloadModel(MODEL))
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.turn()
    slot = bench.submit()
    assert bench.begin(worker, 1) == [slot]


def test_a_released_worker_finishes_its_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.batcher.scheduler.scheduler.LAST_ARRIVALS_S", 0.0)
    _, worker = bench.add_worker()
    slot = bench.submit()
    bench.begin(worker, 1)
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.turn()
    assert not worker.stopping
    bench.finish(worker, 1, [slot])
    assert worker.stopping
    assert WorkerReleased(WORKER, 1) in bench.notices


def test_the_last_worker_serves_what_waits_before_it_leaves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.batcher.scheduler.scheduler.LAST_ARRIVALS_S", 0.0)
    _, other = bench.add_worker()
    _, worker = bench.add_worker(9001)
    slots = [bench.submit() for _ in range(3)]
    bench.begin(other, 1)
    bench.begin(worker, 1)
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.loop.command(ReleaseWorker(9001, 1))
    bench.finish(other, 1, slots[:1])
    assert other.stopping
    bench.finish(worker, 1, slots[1:2])
    assert not worker.stopping
    bench.begin(worker, 2)
    bench.finish(worker, 2, slots[2:])
    bench.turn()
    assert [bench.status(slot) for slot in slots] == [418] * 3
    assert worker.stopping


def test_the_last_worker_takes_jobs_that_were_on_their_way(bench: Bench) -> None:
    _, worker = bench.add_worker()
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.turn()
    slot = bench.submit()
    assert bench.begin(worker, 1) == [slot]


def test_the_last_worker_leaves_when_another_has_come(bench: Bench) -> None:
    _, worker = bench.add_worker()
    slots = [bench.submit(), bench.submit()]
    bench.begin(worker, 1)
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.turn()
    _, successor = bench.add_worker(9001)
    assert bench.begin(successor, 1) == slots[1:]
    bench.finish(worker, 1, slots[:1])
    assert worker.stopping


def test_a_worker_over_its_response_timeout_is_reported_once(prefix: str) -> None:
    bench = Bench(prefix, response_timeout_s=0.0)
    _, worker = bench.add_worker()
    bench.submit()
    bench.begin(worker, 1)
    worker.words[MailWord.START_NS] = 1
    bench.loop._next_tick = 0.0
    bench.loop.turn()
    bench.loop._next_tick = 0.0
    bench.loop.turn()
    assert bench.notices.count(KillWorker(WORKER, 1)) == 1


def test_large_bodies_give_their_pages_back_beyond_the_warm_budget(bench: Bench) -> None:
    _, worker = bench.add_worker()
    body = bytes(range(256)) * 390
    slot = bench.submit(body)
    start = bench.segment.layout.request_payload(slot) + layout.HEAD_ROOM
    assert bytes(bench.segment.buffer[start : start + len(body)]) == body
    bench.finish(worker, 1, bench.begin(worker, 1))
    bench.client.release(slot)
    assert bytes(bench.segment.buffer[start : start + 16]) == bytes(16)


def test_the_ring_goes_round(bench: Bench) -> None:
    _, worker = bench.add_worker()
    for number in range(1, 100):
        slot = bench.submit(b"%d" % number)
        bench.finish(worker, number, bench.begin(worker, number))
        bench.client.release(slot)
    assert bench.client.in_flight == 0


def test_a_continuous_batch_is_filled_up_as_its_requests_end(prefix: str) -> None:
    bench = Bench(prefix, batch_size=2, continuous_batching=True)
    _, worker = bench.add_worker()
    slots = [bench.submit() for _ in range(3)]
    assert bench.join(worker, 1) + bench.join(worker, 2) == slots[:2]
    assert worker.posted() == 2
    bench.end(worker, slots[0])
    bench.turn()
    assert bench.join(worker, 3) == slots[2:]
    for slot in slots[1:]:
        bench.end(worker, slot)
    bench.turn()
    assert bench.outstanding() == 0


def test_a_batch_waits_for_a_place_in_the_mailbox(prefix: str) -> None:
    bench = Bench(prefix, batch_size=16, continuous_batching=True)
    _, worker = bench.add_worker()
    places = worker_layout.MAIL_PLACES
    slots = [bench.submit() for _ in range(places + 2)]
    assert worker.posted() == places
    for number in range(1, places + 1):
        assert bench.join(worker, number) == slots[number - 1 : number]
    assert bench.join(worker, places + 1) == slots[places:]


def test_a_continuous_batch_knows_its_requests_by_their_generation(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True)
    _, worker = bench.add_worker()
    slot = bench.submit()
    bench.join(worker, 1)
    bench.end(worker, slot)
    bench.client.release(slot)
    # The client is back, in the same slot, before the loop has looked.
    assert bench.submit() == slot
    assert bench.join(worker, 2) == [slot]
    assert bench.outstanding() == 1
    bench.end(worker, slot)
    bench.turn()
    assert bench.outstanding() == 0


def test_rule_3_holds_for_the_requests_of_a_continuous_batch(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True)
    ours, worker = bench.add_worker()
    ended, running = bench.submit(), bench.submit()
    bench.join(worker, 1)
    bench.join(worker, 2)
    waiting = bench.submit()
    bench.end(worker, ended)
    bench.client.release(ended)
    again = bench.client.take()
    assert again == ended
    bench.loop.command(SettleWorker(ours))
    bench.turn()
    assert (bench.state(running), bench.status(running)) == (SlotState.FAILED, 500)
    assert bench.state(waiting) == SlotState.CLAIMED
    assert bench.state(again) == SlotState.WRITING
    _, successor = bench.add_worker(9001)
    assert bench.join(successor, 1) == [waiting]


def test_a_worker_leaves_when_its_last_stream_has_ended(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True)
    _, worker = bench.add_worker()
    slot = bench.submit()
    bench.join(worker, 1)
    bench.add_worker(9001)
    bench.loop.command(ReleaseWorker(WORKER, 1))
    bench.submit()
    assert (worker.posted(), worker.stopping) == (1, False)
    bench.end(worker, slot)
    bench.turn()
    assert worker.stopping
    assert WorkerReleased(WORKER, 1) in bench.notices


def test_the_response_timeout_is_that_of_one_step(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True, response_timeout_s=60.0)
    _, worker = bench.add_worker()
    bench.submit()
    bench.join(worker, 1)
    bench.loop._next_tick = 0.0
    bench.turn()
    kill = KillWorker(WORKER, 1)
    assert kill not in bench.notices
    worker.begin_step(1)
    bench.loop._next_tick = 0.0
    bench.turn()
    assert bench.notices.count(kill) == 1


def test_requests_of_a_retired_segment_count_as_given_up(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True)
    _, worker = bench.add_worker()
    slot = bench.submit()
    bench.join(worker, 1)
    bench.loop.command(RetireSegment(1))
    bench.turn()
    assert bench.segment.cancels[slot] == 1
    assert SegmentRetired(1) not in bench.notices
    bench.end(worker, slot)
    bench.turn()
    assert SegmentRetired(1) in bench.notices


SEQUENCES = {"sequence_batching": True, "sequence_max_idle_ms": 60_000, "max_sequences": 4, "max_sequence_queue": 4}


def test_a_batch_has_one_request_of_a_sequence(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, **SEQUENCES)
    a, b, again = bench.submit(sequence=b"a"), bench.submit(sequence=b"b"), bench.submit(sequence=b"a")
    _, worker = bench.add_worker()
    assert bench.begin(worker, 1) == [a, b]
    assert worker.posted() == 1
    bench.finish(worker, 1, [a, b])
    assert bench.begin(worker, 2) == [again]


def test_a_sequence_ends_with_its_worker(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, **SEQUENCES)
    ours, worker = bench.add_worker()
    running = bench.submit(sequence=b"a")
    bench.begin(worker, 1)
    waiting = bench.submit(sequence=b"a")
    bench.loop.command(SettleWorker(ours))
    bench.turn()
    assert (bench.status(running), bench.status(waiting)) == (500, 503)


def test_a_sequence_goes_on_after_a_request_whose_client_left(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, **SEQUENCES)
    left, stayed = bench.submit(sequence=b"a"), bench.submit(sequence=b"a")
    bench.client.cancel(left)
    _, worker = bench.add_worker()
    assert bench.state(left) == SlotState.FAILED
    assert bench.begin(worker, 1) == [stayed]


def test_the_handler_ends_a_sequence(prefix: str) -> None:
    bench = Bench(prefix, batch_size=4, continuous_batching=True, **SEQUENCES)
    _, worker = bench.add_worker()
    running = bench.submit(sequence=b"a")
    bench.join(worker, 1)
    waiting = bench.submit(sequence=b"a")
    assert worker.put_ended([mark_of("a")]) == []
    bench.turn()
    assert (bench.state(running), bench.status(waiting)) == (SlotState.RUNNING, 503)
    # Of more than there is room for, the rest is told when the batcher has looked.
    assert worker.put_ended(list(range(worker_layout.MAIL_MARKS + 1))) == [worker_layout.MAIL_MARKS]
    bench.turn()
    assert worker.put_ended([worker_layout.MAIL_MARKS]) == []


def test_a_new_batcher_refuses_what_waited_in_a_sequence(prefix: str) -> None:
    bench = Bench(prefix, **SEQUENCES)
    waiting = bench.submit(sequence=b"a")
    bench.loop = bench.new_loop()
    bench.turn()
    assert (bench.state(waiting), bench.status(waiting)) == (SlotState.FAILED, 503)
    # What comes before the batcher has been told of the model waits for that.
    early = bench.submit(sequence=b"a")
    bench.loop.command(TakeModel(bench.spec))
    _, worker = bench.add_worker(9001)
    assert bench.begin(worker, 1) == [early]
