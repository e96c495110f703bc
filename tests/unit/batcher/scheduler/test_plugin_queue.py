"""Batches that a plugin forms: who goes together, in which order, and what a bad plugin may not do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Jobs

from wsgi_ts.batcher.scheduler.actions import Dispatch, Fail
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.model_queue import Worker
from wsgi_ts.batcher.scheduler.plugin_queue import PluginQueue, head_of
from wsgi_ts.batcher.scheduler.scheduler import Scheduler
from wsgi_ts.batcher.shm.worker_layout import Progress
from wsgi_ts.messages import ModelSpec
from wsgi_ts.plugins.api import BatchHead, ModelState, QueueState
from wsgi_ts.plugins.batching import BatchingRules
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import PluginReport


class ByLength:
    def key(self, head: BatchHead) -> int:
        return head.body_bytes.bit_length()

    def cost(self, head: BatchHead) -> float:
        return head.body_bytes

    def admit(self, batch_cost: float, batch_n: int, cost: float) -> bool:
        return batch_cost + cost <= 100

    def wait(self, queue: QueueState, model: ModelState) -> float:
        return 0.0


class Place:
    """One model with a policy, and a worker; `ask` queues requests with bodies of some lengths."""

    def __init__(self, tmp_path: Path, policy: object, batch_size: int = 4) -> None:
        spec = ModelSpec(
            0, "m", "1.0", "/m", "h", None, batch_size=batch_size, max_batch_delay_ms=100, batch_policy="none"
        )
        report = PluginReport(tmp_path, "test")
        self.calls = [0]
        self.rules = BatchingRules(Found("p", "batching", "a:b", "test"), policy, report, self.calls)
        self.queue = PluginQueue(spec, self.rules, head_of)
        self.scheduler = Scheduler(0.0)
        self.scheduler.load_model(spec, 0.0, self.queue)
        self.jobs = Jobs()
        self.lengths: dict[Job, int] = {}

    def worker(self, number: int = 9000) -> Worker:
        worker = Worker(number, 1, 0)
        self.scheduler.worker_ready(worker, 0.0)
        return worker

    def ask(self, *lengths: int, at: float = 0.0) -> None:
        new = []
        for length in lengths:
            job = self.jobs.job(len(self.lengths), came_at=at)
            self.jobs.segment.heads[job.slot] = (b"POST / HTTP/1.1\r\nX-A: b\r\n\r\n", length)
            self.lengths[job] = length
            new.append(job)
        self.scheduler.arrived(0, new, at)

    def dispatched(self, now: float = 0.0) -> list[list[int]]:
        actions = self.scheduler.dispatch(now)
        return [[self.lengths[job] for job in each.batch.jobs] for each in actions if isinstance(each, Dispatch)]

    def end(self, worker: Worker, now: float) -> None:
        for batch in worker.batches:
            for job in batch.jobs:
                self.jobs.answer(job)
        self.scheduler.progressed(worker, Progress(worker.posted, now, 0.01), now)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, ByLength())


def test_unlike_keys_never_share_a_batch(place: Place) -> None:
    worker = place.worker()
    place.ask(3, 30, 3, 30, 3)
    seen = []
    for turn in range(5):
        seen += place.dispatched(turn)
        place.end(worker, turn)
    assert seen == [[3, 3, 3], [30, 30]]


def test_full_batches_go_first_but_nobody_waits_too_long(place: Place) -> None:
    worker = place.worker()
    place.ask(30, 3, 3, 3, 3)
    assert place.dispatched(0.05) == [[3, 3, 3, 3]]
    place.end(worker, 0.06)
    place.ask(3, 3, 3, 3, at=0.06)
    assert place.dispatched(0.2) == [[30]]


def test_a_batch_that_admits_no_more_is_full(place: Place) -> None:
    worker = place.worker()
    place.ask(40, 40, 40)
    assert place.dispatched() == [[40, 40]]
    place.end(worker, 0.1)
    assert place.dispatched(0.1) == [[40]]


def test_how_long_to_wait(tmp_path: Path) -> None:
    class Waits(ByLength):
        asked: list[tuple[QueueState, ModelState]]

        def __init__(self) -> None:
            self.asked = []

        def wait(self, queue: QueueState, model: ModelState) -> float:
            self.asked.append((queue, model))
            return 10.0

    policy = Waits()
    place = Place(tmp_path, policy)
    place.worker()
    place.ask(3, 3)
    assert place.dispatched(0.01) == []
    assert place.scheduler.wake_at == pytest.approx(0.1)
    queue, model = policy.asked[0]
    assert (queue.waiting, queue.cost, queue.queued, model.batch_size) == (2, 6, 2, 4)
    assert queue.oldest_s == pytest.approx(0.01)
    assert place.dispatched(0.1) == [[3, 3]]


def test_methods_that_are_left_out(tmp_path: Path) -> None:
    class KeyOnly:
        def key(self, head: BatchHead) -> str:
            return head.headers["x-a"]

    place = Place(tmp_path, KeyOnly())
    place.worker()
    place.ask(1, 2000, 3)
    assert place.dispatched() == [[1, 2000, 3]]


@pytest.mark.parametrize("method", ["key", "cost", "admit", "wait"])
@pytest.mark.parametrize("fault", ["raises", "exits", "sleeps", "nonsense"])
def test_a_bad_policy_is_switched_off_and_loses_nothing(tmp_path: Path, method: str, fault: str) -> None:
    policy: Any = ByLength()

    def bad(*arguments: object) -> object:
        seen_calls.append(place.calls[0])
        if fault == "raises":
            raise KeyError("no")
        if fault == "exits":
            raise SystemExit(0)
        if fault == "sleeps":
            time.sleep(0.15)
            return 1
        return [object()]

    setattr(policy, method, bad)
    seen_calls: list[int] = []
    place = Place(tmp_path, policy)
    worker = place.worker()
    place.ask(3, 30, 3, 30, 3)
    seen = []
    for turn in range(8):
        seen += place.dispatched(turn)
        place.end(worker, turn)
    assert sorted(length for batch in seen for length in batch) == [3, 3, 3, 30, 30]
    assert set(seen_calls) == {1} and place.calls == [0], "a call that is under way is to be seen from outside"
    if (method, fault) != ("admit", "nonsense"):  # a list is as good as True
        assert not place.rules.is_on
        place.ask(3, 30)
        assert place.dispatched(9) == [[3, 30]]


def test_what_waits_for_a_worker_of_a_model_that_goes_is_answered(place: Place) -> None:
    place.ask(3, 30, 300)
    actions = place.scheduler.unload_model(0, 1.0)
    (fail,) = [each for each in actions if isinstance(each, Fail)]
    assert len(fail.jobs) == 3


def test_a_worker_that_dies_gives_its_batch_back(place: Place) -> None:
    worker = place.worker()
    place.ask(3, 3, 30)
    assert place.dispatched() == [[3, 3]]
    place.scheduler.worker_gone(worker, oom=False, now=1.0)
    again = place.worker(9001)
    assert place.dispatched(1.0) == [[3]]  # what may have ended its worker goes alone
    place.end(again, 1.0)
    seen = []
    for turn in range(3):
        seen += place.dispatched(2.0 + turn)
        place.end(again, 2.0 + turn)
    assert sorted(seen) == [[3], [30]]


def test_a_busy_machine_switches_nothing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of 20 ms now and then are the machine's; 60 µs each time are the policy's."""
    clock = [0.0]
    took = [0.0]

    class Timed:
        def cost(self, head: BatchHead) -> float:
            clock[0] += took[0]
            return 1.0

    monkeypatch.setattr("wsgi_ts.plugins.batching.time.perf_counter", lambda: clock[0])
    place = Place(tmp_path, Timed())
    for number in range(5000):
        took[0] = 0.02 if number % 1000 == 0 else 5e-6
        place.rules.cost(BatchHead({}, 1))
    assert place.rules.is_on
    took[0] = 90e-6
    for _ in range(5000):
        place.rules.cost(BatchHead({}, 1))
    assert not place.rules.is_on
