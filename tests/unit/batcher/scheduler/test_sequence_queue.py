"""The table of sequences, held to a model of it: order, one at a time, one worker, limits, ends."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.jobs import Jobs

from wsgi_ts.batcher.scheduler.job import Job, Sequence
from wsgi_ts.batcher.scheduler.sequences import SequenceQueue
from wsgi_ts.batcher.shm.worker_layout import mark_of
from wsgi_ts.messages import ModelSpec

SEQUENCES, WAITING, WORKERS, IDLE_S, AGE_S = 4, 3, 2, 5.0, 30.0


def make_queue(**fields: int) -> SequenceQueue:
    """A queue of sequences."""
    values = {
        "sequence_max_idle_ms": int(IDLE_S * 1000),
        "sequence_timeout_ms": int(AGE_S * 1000),
        "max_sequences": SEQUENCES,
        "max_sequence_queue": WAITING,
        "min_workers": WORKERS,
        "max_workers": WORKERS,
        **fields,
    }
    spec = ModelSpec(0, "m", "1", "/m", "h", None, sequence_batching=True, **values)  # type: ignore[arg-type]
    return SequenceQueue(spec, lambda: WORKERS)


def numbers(jobs: list[Job]) -> list[int]:
    return [job.slot for job in jobs]


class SequencesMachine(RuleBasedStateMachine):
    """Clients, workers and a clock in any order, and what must hold of what the queue then does."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[int, str] = {}
        self.jobs = Jobs()
        self.queue = make_queue()
        self.now = 0.0
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self.running: list[tuple[int, Job, Sequence]] = []  # worker, job, sequence
        self.home: dict[int, int] = {}  # id() of a sequence that is kept alive below -> its worker
        self.kept: list[Sequence] = []

    @rule(key=st.sampled_from("abcdef"))
    def ask(self, key: str) -> None:
        job = len(self.keys)
        self.keys[job] = key
        full = len(self.waiting[key]) >= WAITING
        if not self.queue.offer([self.jobs.job(job, self.now, key)]):
            assert not full
            self.waiting[key].append(job)

    @rule(worker=st.integers(0, WORKERS - 1), count=st.integers(1, 3))
    def poll(self, worker: int, count: int) -> None:
        taken = self.queue.take_for(worker, count)
        assert len(taken) <= count
        assert len({id(job.sequence) for job in taken}) == len(taken)
        for job in taken:
            sequence = job.sequence
            assert sequence is not None
            assert self.waiting[self.keys[job.slot]].pop(0) == job.slot
            assert not any(sequence is other for _, _, other in self.running)
            assert self.home.setdefault(id(sequence), worker) == worker
            self.kept.append(sequence)
            self.running.append((worker, job, sequence))

    @rule(which=st.integers(0, 9))
    def answer(self, which: int) -> None:
        if which < len(self.running):
            _, job, _ = self.running.pop(which)
            self.queue.ended([job], self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, IDLE_S + 0.1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.refused(self.queue.expire(self.now))

    @rule(worker=st.integers(0, WORKERS - 1))
    def die(self, worker: int) -> None:
        self.running = [each for each in self.running if each[0] != worker]
        self.refused(self.queue.end_those_of(worker))

    @rule(key=st.sampled_from("abcdef"))
    def end(self, key: str) -> None:
        self.refused(self.queue.end_marked([mark_of(key)]))
        assert not self.waiting[key]

    @rule(key=st.sampled_from("abcdef"))
    def leave(self, key: str) -> None:
        gone = self.queue.drop(lambda job: self.keys[job.slot] == key)
        assert sorted(numbers(gone)) == self.waiting[key]
        self.waiting[key] = []

    def refused(self, jobs: list[Job]) -> None:
        for job in numbers(jobs):
            self.waiting[self.keys[job]].remove(job)

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = [job for jobs in self.waiting.values() for job in jobs]
        assert len(self.queue) == len(waiting)
        assert self.queue.sequences <= SEQUENCES

    def teardown(self) -> None:
        waiting = sorted(job for jobs in self.waiting.values() for job in jobs)
        assert sorted(numbers(self.queue.take(len(self.queue)))) == waiting
        assert len(self.queue) == 0


SequencesMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSequences = SequencesMachine.TestCase


def test_workers_share_new_sequences_and_keep_them() -> None:
    jobs, queue = Jobs(), make_queue()
    assert queue.offer([jobs.job(number, number, key) for number, key in enumerate("abcd" * 2)]) == []
    first, second = queue.take_for(1, 8), queue.take_for(2, 8)
    # Half of those that wait, then half of the rest: max(1, pending / maxWorkers).
    assert [numbers(taken) for taken in (first, second)] == [[0, 1], [2]]
    queue.ended(first + second, 9.0)
    assert numbers(queue.take_for(2, 8)) == [3, 6]
    assert numbers(queue.take_for(1, 8)) == [4, 5]


def test_a_worker_has_no_more_than_its_share() -> None:
    jobs, queue = Jobs(), make_queue(max_workers=1)
    for number, key in enumerate("abcd"):
        queue.offer([jobs.job(number, 0.0, key)])
    assert numbers(queue.take_for(1, 8)) == [0, 1]
    assert queue.take_for(1, 8) == []
    assert len(queue.end_those_of(1)) == 0
    assert numbers(queue.take_for(3, 8)) == [2, 3]


def test_limits_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    jobs, queue = Jobs(), make_queue(max_sequences=1, max_sequence_queue=2)
    assert numbers(queue.offer([jobs.job(number, 0.0, key) for number, key in enumerate("aaba")])) == [2, 3]
    assert "added jobGroup for sequenceId:a" in caplog.text
    assert "Skip the requestId: request-2 for sequence: b due to exceeding maxNumSequence: 1" in caplog.text
    for _ in range(2):
        (job,) = queue.take_for(1, 4)
        queue.ended([job], 1.0)
    assert numbers(queue.offer([jobs.job(4, IDLE_S + 0.9, "b")])) == [4]
    # Expired, though nobody has looked since.
    assert queue.offer([jobs.job(4, IDLE_S + 1.1, "b")]) == []
    assert "Clean jobGroup: a" in caplog.text


def test_age_ends_a_sequence_that_is_busy() -> None:
    jobs, queue = Jobs(), make_queue()
    queue.offer([jobs.job(0, 0.0, "a"), jobs.job(1, 0.0, "a")])
    (old,) = queue.take_for(1, 4)
    assert queue.expire(AGE_S - 1) == []
    assert numbers(queue.expire(AGE_S + 1)) == [1]
    assert queue.offer([jobs.job(2, AGE_S + 2, "a")]) == []
    (new,) = queue.take_for(2, 4)
    queue.ended([old], AGE_S + 3)
    assert new.sequence is not None
    assert (new.slot, new.sequence.worker, new.sequence.running) == (2, 2, True)
