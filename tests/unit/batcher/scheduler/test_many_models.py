"""A turn costs what has happened in it, however many models there are."""

from __future__ import annotations

import pytest
from support.jobs import Jobs

from wsgi_ts.batcher.scheduler import model_queue
from wsgi_ts.batcher.scheduler.actions import Dispatch
from wsgi_ts.batcher.scheduler.model_queue import ModelQueue, Worker
from wsgi_ts.batcher.scheduler.scheduler import FEW, Scheduler
from wsgi_ts.batcher.shm.layout import News
from wsgi_ts.messages import ModelSpec

MODELS = 500


@pytest.fixture
def scheduler() -> Scheduler:
    """One that has many models, with a worker each."""
    made = Scheduler(-100.0)
    for index in range(MODELS):
        made.load_model(ModelSpec(index, f"m{index}", "1", "/m", "h", None, batch_policy="none"), 0.0)
        made.worker_ready(Worker(9000 + index, 1, index), 0.0)
    made.dispatch(0.0)
    return made


@pytest.mark.skipif(
    not str(model_queue.__file__).endswith(".py"), reason="compiled models cannot be watched; it runs interpreted, too"
)
def test_a_turn_looks_only_at_models_that_have_something_to_do(scheduler: Scheduler) -> None:
    looked_at: set[int] = set()

    class Watched(ModelQueue):
        def __getattribute__(self, name: str) -> object:
            looked_at.add(super().__getattribute__("spec").index)
            return super().__getattribute__(name)

    for model in scheduler.models.values():
        model.__class__ = Watched
    jobs = Jobs()
    looked_at.clear()
    for index in (7, 300):
        assert not scheduler.arrived(index, [jobs.job(index)], 1.0)
    dispatched = scheduler.dispatch(1.0)
    assert [each.worker.model for each in dispatched if isinstance(each, Dispatch)] == [7, 300]
    assert scheduler.wanted_news() == News.SUBMISSION
    assert {7, 300} <= looked_at
    assert len(looked_at) <= FEW + 2


def test_every_model_is_served_when_all_have_jobs(scheduler: Scheduler) -> None:
    jobs = Jobs()
    for index in range(MODELS):
        scheduler.arrived(index, [jobs.job(index)], 1.0)
    dispatched = scheduler.dispatch(1.0)
    assert [each.worker.model for each in dispatched if isinstance(each, Dispatch)] == list(range(MODELS))
    assert scheduler.dispatch(1.0) == []
