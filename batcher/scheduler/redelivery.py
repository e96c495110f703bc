"""What becomes of jobs that no worker answers: theirs has died, its handler has failed, their time is over. Pure.

What no handler has seen goes back to the head of the queue; what one has seen only where the model allows it
(`maxExecutions`). Whatever cannot wait again is answered (README in the folder above, rules 3 and 4).
"""

from __future__ import annotations

import logging

from wsgi_ts.batcher.scheduler.actions import Action, Fail, Repeat, Settle
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.model_queue import Batch, ModelQueue, Worker
from wsgi_ts.batcher.shm.layout import CLIENT_GONE, TOO_LATE, WORKER_DIED, ModelWord, SlotState

log = logging.getLogger("wsgi_ts.batcher")

#: Status of answers whose text the web side composes, since it knows how the model was asked for.
NO_WORKER = 503
#: How often a request is dispatched to workers that end before they begin it; then it is answered with an error.
MOST_DELIVERIES = 3
_GIVEN_UP = f"{WORKER_DIED} {MOST_DELIVERIES} workers ended before they had read this request: it is not tried again."


def end_of_worker(model: ModelQueue, worker: Worker, oom: bool, now: float) -> list[Action]:
    """Answers what a dead worker had begun, or has it run again, and queues again what it had not begun.

    With `oom` it ran out of memory; `now` is in monotonic seconds.
    """
    status = 507 if oom else 500
    counted = ModelWord.TIMED_OUT if worker.killed else ModelWord.FAILED
    actions: list[Action] = []
    for batch in reversed(worker.batches):
        again = _run_again(model, worker, batch.given_back(), oom, now)
        begun = [job for job in batch.jobs if job.state in (SlotState.RUNNING, SlotState.STREAMING)]
        ended = [job for job in begun if job not in again]
        actions.append(Fail(worker.model, ended, status, WORKER_DIED, counted, batch.facts(worker.worker_id)))
        unbegun = batch.take_unbegun()
        # What lay behind the batch that it had begun, or was to begin, has nothing to do with the worker's death.
        if batch.number <= worker.done + 1 and model.sequences is None:
            for job in unbegun:
                job.deliveries += 1
                job.most = 1
            given_up = [job for job in unbegun if job.deliveries >= MOST_DELIVERIES]
            unbegun = [job for job in unbegun if job.deliveries < MOST_DELIVERIES]
            actions += _give_up(model, given_up, status)
        actions += requeue(model, unbegun)
        actions += repeat(model, again, "its worker has died")
    actions.append(Fail(worker.model, model.end_sequences_of(worker), NO_WORKER))
    return actions


def end_over(model: ModelQueue, jobs: list[Job], oldest_ns: int, now: float) -> list[Action]:
    """Answers jobs that are not to be begun any more (`Job.is_over`): too late, or their client has gone."""
    if model.sequences is not None:
        model.sequences.ended(jobs, now)
    # Looked at first: the web worker gives up a request that is too late as it does one whose client has gone.
    late = [job for job in jobs if job.arrived_ns < oldest_ns]
    gone = [job for job in jobs if job.arrived_ns >= oldest_ns]
    return [
        Fail(model.spec.index, late, 408, TOO_LATE, ModelWord.EXPIRED),
        Fail(model.spec.index, gone, 499, CLIENT_GONE, ModelWord.CANCELLED),
    ]


def end_of_failed(
    model: ModelQueue, worker: Worker, batch: Batch, failed: list[Job], oom: bool, now: float
) -> tuple[list[Job], Settle]:
    """Decides about a batch that its worker has given back, since the handler has failed for `failed`, not answered.

    Returns:
        The jobs that run again, for `repeat`, which the batch has no more, and what answers the others.
    """
    again = _run_again(model, worker, failed, oom, now)
    batch.jobs = [job for job in batch.jobs if job not in again]
    return again, Settle(worker.model, [job for job in failed if job not in again])


def repeat(model: ModelQueue, jobs: list[Job], why: str) -> list[Action]:
    """Puts jobs whose batch has failed back at the head of the queue; `why` is for the log."""
    if not jobs:
        return []
    log.warning(
        "Model %s %s: a batch failed (%s): %d of its requests run again, in batches of at most %d",
        *(model.spec.name, model.spec.version, why, len(jobs), jobs[0].most),
    )
    model.jobs.put_back(jobs)
    return [Repeat(model.spec.index, jobs)]


def requeue(model: ModelQueue, unbegun: list[Job]) -> list[Action]:
    """Puts jobs that no handler has seen back at the head of the queue."""
    # What a sequence's worker knew of it is gone with the worker.
    if model.accepting and model.sequences is None:
        model.jobs.put_back(unbegun)
        return []
    return [Fail(model.spec.index, unbegun, NO_WORKER)]


def _run_again(model: ModelQueue, worker: Worker, failed: list[Job], oom: bool, now: float) -> list[Job]:
    """Which of the jobs that a handler has had, and has not answered, run again; with `oom` memory was too small."""
    if model.halving is None or not model.accepting:
        return []
    if oom and failed:
        model.halving.ran_out_of_memory(worker.worker_id, len(failed), now)
    return model.halving.again(failed)


def _give_up(model: ModelQueue, jobs: list[Job], status: int) -> list[Action]:
    for job in jobs:
        log.error(
            "Model %s %s: request %s is answered %d, since %d workers ended before they had read it",
            *(model.spec.name, model.spec.version, job.ids[1], status, MOST_DELIVERIES),
        )
    return [Fail(model.spec.index, jobs, status, _GIVEN_UP, ModelWord.FAILED)]
