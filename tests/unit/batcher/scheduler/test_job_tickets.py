"""Job tickets: who is let in, by what the workers of a model are doing."""

from __future__ import annotations

from typing import Any

import pytest
from support.jobs import Jobs

from wsgi_ts.batcher.scheduler.dispatch import Batch, ModelQueue, WorkerSeat
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.messages import ModelSpec


class Mailbox:
    """A mailbox that only counts."""

    posted = started = done = 0

    def post(self, entries: list[int]) -> int:
        self.posted += 1
        return self.posted

    def revoke(self, number: int) -> bool:
        return False


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def queue() -> ModelQueue:
    spec = ModelSpec(0, "m", "1", "/m", "h", None, batch_size=4, job_queue_size=3, use_job_ticket=True)
    counters: Any = None
    found = ModelQueue(spec, counters)
    found.seats = [WorkerSeat(number, 1, 0, Mailbox()) for number in range(2)]
    return found


def work(seat: WorkerSeat, *jobs: Job) -> None:
    seat.batches.append(Batch(1, list(jobs), 0.0, True))


def test_as_many_wait_as_workers_are_free(queue: ModelQueue, jobs: Jobs) -> None:
    assert [queue.jobs.offer(jobs.job(number)) for number in (1, 2, 3)] == [True, True, False]
    assert queue.policy.decide(0.0, 1, 0.0, 4) == 0.0
    assert queue.batch_size == 1


def test_busy_leaving_and_killed_workers_are_not_free(queue: ModelQueue, jobs: Jobs) -> None:
    work(queue.seats[0], jobs.job(7))
    assert queue.free_workers() == 1
    queue.seats[1].leaving = True
    assert not queue.jobs.offer(jobs.job(1))
    queue.seats[1].leaving, queue.seats[1].killed = False, True
    assert not queue.jobs.offer(jobs.job(1))


def test_a_worker_whose_answer_is_there_is_free_before_it_says_so(queue: ModelQueue, jobs: Jobs) -> None:
    first, second = jobs.job(7), jobs.job(8)
    work(queue.seats[0], first)
    work(queue.seats[1], second)
    assert queue.free_workers() == 0
    jobs.answer(first)
    assert queue.jobs.offer(jobs.job(1))
    # The slot of the first job may be the next request's by now: the job has its answer all the same.
    jobs.take_again(first)
    assert queue.free_workers() == 1
    assert not queue.jobs.offer(jobs.job(2))


def test_the_queue_s_capacity_holds_too(queue: ModelQueue, jobs: Jobs) -> None:
    queue.seats += [WorkerSeat(number, 1, 0, Mailbox()) for number in range(2, 9)]
    assert [queue.jobs.offer(jobs.job(number)) for number in range(4)] == [True, True, True, False]
