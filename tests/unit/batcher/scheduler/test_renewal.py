"""Settings of a model that are renewed while requests wait and run."""

from __future__ import annotations

from dataclasses import replace

from support.jobs import Jobs

from wsgi_ts.batcher.scheduler.actions import Dispatch
from wsgi_ts.batcher.scheduler.model_queue import Worker
from wsgi_ts.batcher.scheduler.scheduler import Scheduler
from wsgi_ts.batcher.shm.worker_layout import Progress
from wsgi_ts.messages import ModelSpec

SPEC = ModelSpec(0, "m", "1", "/m", "h", None, batch_size=2, max_batch_delay_ms=1000, batch_policy="fixed")


class Place:
    """A model with one worker; `ask` queues requests, `sizes` dispatches."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self.scheduler = Scheduler(0.0)
        self.scheduler.load_model(spec, 0.0)
        self.worker = Worker(9000, 1, 0, capacity)
        self.scheduler.worker_ready(self.worker, 0.0)
        self.jobs = Jobs()
        self.count = 0

    def ask(self, count: int) -> int:
        """Returns how many are refused."""
        new = [self.jobs.job(self.count + number) for number in range(count)]
        self.count += count
        return sum(len(action.jobs) for action in self.scheduler.arrived(0, new, 0.0))

    def sizes(self, now: float = 0.0) -> list[int]:
        actions = self.scheduler.dispatch(now)
        sizes = [len(each.batch.jobs) for each in actions if isinstance(each, Dispatch)]
        progress = Progress(self.worker.posted, now, 0.001)
        self.scheduler.progressed(self.worker, progress, now)
        return sizes


def test_the_next_batch_has_the_new_size_and_rule_and_nothing_that_waits_is_lost() -> None:
    place = Place(SPEC, capacity=8)
    place.ask(1)
    assert place.sizes() == []
    place.scheduler.load_model(replace(SPEC, batch_policy="none"), 0.0)
    assert place.sizes() == [1]
    place.ask(6)
    place.scheduler.load_model(replace(SPEC, batch_size=4, batch_policy="none"), 0.0)
    assert place.sizes() + place.sizes() == [4, 2]


def test_no_worker_gets_more_than_its_mailbox_holds() -> None:
    place = Place(replace(SPEC, batch_policy="none"), capacity=2)
    place.scheduler.load_model(replace(SPEC, batch_size=4, batch_policy="none"), 0.0)
    place.ask(3)
    assert place.sizes() + place.sizes() == [2, 1]


def test_steps_of_a_continuous_batch_likewise() -> None:
    spec = replace(SPEC, batch_size=8, continuous_batching=True)
    place = Place(spec, capacity=3)
    place.ask(5)
    assert place.sizes() == [3]
    place.scheduler.load_model(replace(spec, batch_size=2), 0.0)
    assert place.scheduler.models[0].batch_size == 2


def test_the_queue_has_the_new_length() -> None:
    place = Place(replace(SPEC, job_queue_size=2), capacity=2)
    place.ask(1)
    place.scheduler.load_model(replace(SPEC, job_queue_size=4), 0.0)
    assert place.ask(5) == 2


def test_how_requests_come_together_stays() -> None:
    place = Place(SPEC, capacity=2)
    place.scheduler.load_model(replace(SPEC, continuous_batching=True, batch_size=7), 0.0)
    assert place.scheduler.models[0].batch_size == 2
    assert not place.scheduler.models[0].joins_steps
