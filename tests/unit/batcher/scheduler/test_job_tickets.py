"""Job tickets: who is let in, by what the workers of a model are doing."""

from __future__ import annotations

import pytest
from support.jobs import Jobs

from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.model_queue import Batch, ModelQueue, Worker
from wsgi_ts.messages import ModelSpec


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def queue() -> ModelQueue:
    spec = ModelSpec(0, "m", "1", "/m", "h", None, batch_size=4, job_queue_size=3, use_job_ticket=True)
    found = ModelQueue(spec)
    found.workers = [Worker(number, 1, 0) for number in range(2)]
    return found


def work(worker: Worker, *jobs: Job) -> None:
    worker.batches.append(Batch(1, list(jobs), 0.0, True))


def let_in(queue: ModelQueue, *jobs: Job) -> list[Job]:
    """Which of the jobs, which come together, are let in."""
    refused = queue.offer(list(jobs))
    return [job for job in jobs if job not in refused]


def test_as_many_wait_as_workers_are_free(queue: ModelQueue, jobs: Jobs) -> None:
    three = [jobs.job(number) for number in (1, 2, 3)]
    assert let_in(queue, *three) == three[:2]
    assert queue.policy.decide(0.0, 1, 0.0, 4) == 0.0
    assert queue.batch_size == 1


def test_as_many_wait_as_workers_are_free_however_they_come(queue: ModelQueue, jobs: Jobs) -> None:
    assert [len(let_in(queue, jobs.job(number))) for number in (1, 2, 3)] == [1, 1, 0]


def test_busy_leaving_and_killed_workers_are_not_free(queue: ModelQueue, jobs: Jobs) -> None:
    work(queue.workers[0], jobs.job(7))
    assert queue.free_workers() == 1
    queue.workers[1].leaving = True
    assert not let_in(queue, jobs.job(1))
    queue.workers[1].leaving, queue.workers[1].killed = False, True
    assert not let_in(queue, jobs.job(1))


def test_a_worker_whose_answer_is_there_is_free_before_it_says_so(queue: ModelQueue, jobs: Jobs) -> None:
    first, second = jobs.job(7), jobs.job(8)
    work(queue.workers[0], first)
    work(queue.workers[1], second)
    assert queue.free_workers() == 0
    jobs.answer(first)
    assert let_in(queue, jobs.job(1))
    # The slot of the first job may be the next request's by now: the job has its answer all the same.
    jobs.take_again(first)
    assert queue.free_workers() == 1
    assert not let_in(queue, jobs.job(2))


def test_the_queue_s_capacity_holds_too(queue: ModelQueue, jobs: Jobs) -> None:
    queue.workers += [Worker(number, 1, 0) for number in range(2, 9)]
    assert [len(let_in(queue, jobs.job(number))) for number in range(4)] == [1, 1, 1, 0]
