"""Who decides: what has happened goes in, what is to be done comes out, as `actions`.

Pure: no clock, no system call, no shared memory but the slots' state and cancel words, which are read through `Job`.
All times are monotonic seconds. Every job that comes in is answered exactly once: by a worker, or by a `Fail`; one
whose web worker has died (`retire`) is dropped instead. Rules: README.md in the folder above.
"""

from __future__ import annotations

from wsgi_ts.batcher.scheduler.actions import Action, Dispatch, Fail, Kill, Record, Release, Revoke, Unloaded
from wsgi_ts.batcher.scheduler.halving import may_go_together
from wsgi_ts.batcher.scheduler.job import Found, Job, SlotTable
from wsgi_ts.batcher.scheduler.model_queue import NEVER, Batch, ModelQueue, NextBatch, Worker
from wsgi_ts.batcher.scheduler.policy import CloseReason
from wsgi_ts.batcher.scheduler.recovered import RecoveredJobs
from wsgi_ts.batcher.scheduler.redelivery import NO_WORKER, end_of_failed, end_of_worker, end_over, repeat, requeue
from wsgi_ts.batcher.shm.layout import NOT_RETURNING, News, SlotState
from wsgi_ts.batcher.shm.worker_layout import Progress
from wsgi_ts.messages import ModelSpec

#: How long a version that is unregistered, or scaled to no workers, still takes jobs: a web worker may have looked at
#: its routes just before.
LAST_ARRIVALS_S = 0.05
#: Longest sleep without being woken for submissions: bounds how late a full queue refuses when a short batch hangs.
UNANNOUNCED_S = 0.02
#: A server with so few versions need not ask each turn which of them have something to do.
FEW = 8


class Scheduler:
    """The jobs, models and model workers of one batcher.

    Args:
        few: so many versions are looked at in each turn even where they have nothing to do, which is then not asked.

    Attributes:
        busy: the workers that have batches.
        wake_at: when to call `dispatch` again if nothing else happens before.
    """

    def __init__(self, now: float, few: int = FEW) -> None:
        self.models: dict[int, ModelQueue] = {}
        self.busy: list[Worker] = []
        #: The versions that a turn has to look at: all with jobs, or that end, or that workers are to leave.
        self._active: dict[int, ModelQueue] = {}
        self.wake_at = NEVER
        self._few = few
        self._recovered = RecoveredJobs(now)

    # -- models and workers come and go

    def load_model(self, spec: ModelSpec, now: float, queue: ModelQueue | None = None) -> list[Action]:
        """Opens the queue of a model version, with the jobs found before it was known, or renews its settings.

        `queue` is its queue, where that is not an ordinary one; it is not looked at where the model has one already.
        """
        known = self.models.get(spec.index)
        if known is not None:
            known.renew(spec)
            return []
        model = self.models[spec.index] = queue or ModelQueue(spec)
        return self._queue_recovered(model, now)

    def unload_model(self, index: int, now: float) -> list[Action]:
        """Begins the end of a model version: what has arrived, or arrives in the next moment, is still served."""
        model = self.models.get(index)
        if model is None:
            return [Unloaded(index)]
        if model.closes_at == NEVER:
            model.closes_at = now + LAST_ARRIVALS_S
            model.held_until = NEVER
            self._active[index] = model
        return self._forget_if_unused(model)

    def worker_ready(self, worker: Worker, now: float) -> list[Action]:
        """Takes in a worker that has loaded its model; one whose model is gone is released at once."""
        if worker.model not in self.models:
            return [Release(worker)]
        worker.idle_since = now
        self.models[worker.model].workers.append(worker)
        return []

    def release_worker(self, worker: Worker, now: float) -> list[Action]:
        """Releases a worker when it has done what it has.

        That of an unregistered version stays until all is served, and so does the last one of a version that is scaled
        to none: nobody else would answer what waits.
        """
        model = self.models[worker.model]
        is_unregistered = model.closes_at < NEVER
        if not model.accepting or not (is_unregistered or model.is_last(worker)):
            return self._let_go(model, worker)
        worker.held = True
        if not is_unregistered:
            model.held_until = now + LAST_ARRIVALS_S
            self._active[worker.model] = model
        return []

    def worker_gone(self, worker: Worker, oom: bool, now: float) -> list[Action]:
        """Answers what a dead worker had begun and queues again what it had not (README, rule 3).

        What its mailbox said last has been told by `progressed`. With `oom` it ran out of memory.
        """
        model = self._active[worker.model] = self.models[worker.model]
        actions = end_of_worker(model, worker, oom, now)
        if worker.batches:
            worker.batches.clear()
            self.busy.remove(worker)
        model.workers.remove(worker)
        return actions + self._forget_if_unused(model)

    def _let_go(self, model: ModelQueue, worker: Worker) -> list[Action]:
        """Gives a worker no further batch; it leaves after those that it has, and takes its sequences along."""
        worker.leaving, worker.held = True, False
        self._active[worker.model] = model
        ended = Fail(worker.model, model.end_sequences_of(worker), NO_WORKER)
        return [ended] if worker.batches else [ended, *self._release(model, worker)]

    def _release(self, model: ModelQueue, worker: Worker) -> list[Action]:
        model.workers.remove(worker)
        return [Release(worker), *self._forget_if_unused(model)]

    def _forget_if_unused(self, model: ModelQueue) -> list[Action]:
        """Ends an unregistered version that has no workers any more; what still waits for one is answered."""
        if model.workers or model.closes_at == NEVER:
            return []
        index = model.spec.index
        del self.models[index]
        self._active.pop(index, None)
        return [Fail(index, model.jobs.take(len(model.jobs)), NO_WORKER), Unloaded(index)]

    # -- jobs come

    def arrived(self, index: int, jobs: list[Job], now: float) -> list[Action]:
        """Queues jobs of the model `index`, in the order in which they came; refuses those for which it has no room."""
        model = self.models.get(index)
        if model is None:
            if not self._recovered.are_kept(now):
                return [Fail(index, jobs, NO_WORKER)]
            return self._recovered.take_in([Found(job, index, SlotState.READY) for job in jobs])
        self._active[index] = model
        refused = model.offer(jobs)
        gone = set(refused)
        model.note_returned([job for job in jobs if job.idle_us != NOT_RETURNING and job not in gone])
        return [Fail(index, refused, NO_WORKER)] if refused else []

    def recover(self, found: list[Found], now: float) -> list[Action]:
        """Takes over what an earlier batcher has left: what no worker had begun is queued once its model is known."""
        actions = self._recovered.take_in(found)
        return actions + [each for model in self.models.values() for each in self._queue_recovered(model, now)]

    def _queue_recovered(self, model: ModelQueue, now: float) -> list[Action]:
        """Queues the recovered jobs of a model; those that an earlier batcher had let in are never refused."""
        index = model.spec.index
        self._active[index] = model
        let_in, others = self._recovered.take(index, now)
        model.jobs.put_back(let_in)
        return [Fail(index, model.offer(others), NO_WORKER)]

    def retire(self, segment: SlotTable) -> None:
        """Drops the waiting jobs of a segment whose web worker is dead; what runs finishes for nobody."""
        self._recovered.drop(segment)
        for model in self.models.values():
            model.jobs.drop(lambda job: job.segment is segment)

    def is_in_flight(self, segment: SlotTable) -> bool:
        """Whether a model worker may still write to one of the segment's slots."""
        return any(job.segment is segment for worker in self.busy for batch in worker.batches for job in batch.jobs)

    # -- jobs go to workers

    def dispatch(self, now: float) -> list[Action]:
        """Gives the waiting jobs to the workers that may have them now; sets `wake_at`."""
        actions: list[Action] = []
        self.wake_at = NEVER
        closing = False
        if len(self._active) > self._few:
            self._active = {index: model for index, model in self._active.items() if model.is_active}
        for model in self._active.values():
            while len(model.jobs):
                following = model.next_batch(now)
                if following is None:
                    self.wake_at = min(self.wake_at, model.wait_until)
                    break
                self._post(model, following, now, actions)
            closing |= model.closes_at < NEVER or model.held_until < NEVER
        return actions + self._close_served(now) if closing else actions

    def _post(self, model: ModelQueue, following: NextBatch, now: float, actions: list[Action]) -> None:
        """Dispatches jobs; those whose client has gone or that are too late are answered instead."""
        worker, jobs, reason = following
        oldest_ns = model.oldest_in_time_ns(now)
        if any([job.arrived_ns < oldest_ns or job.segment.cancels[job.slot] or job.most for job in jobs]):
            over = [job for job in jobs if job.is_over(oldest_ns)]
            actions += end_over(model, over, oldest_ns, now)
            gone = set(over)
            jobs = [job for job in jobs if job not in gone]
            allowed = _cut(model, jobs, may_go_together(jobs))
            if len(allowed) < len(jobs):
                jobs, reason = allowed, CloseReason.SUSPECT
        if model.halving is not None:
            jobs = _cut(model, jobs, model.halving.most_for(worker.worker_id, now))
        if jobs:
            worker.posted += 1
            batch = Batch(worker.posted, jobs, now, not worker.batches, reason)
            if not worker.batches:
                self.busy.append(worker)
            worker.batches.append(batch)
            actions.append(Dispatch(worker, batch))

    def _close_served(self, now: float) -> list[Action]:
        """Releases the workers that were held, where nothing waits for them and nothing can come any more."""
        actions: list[Action] = []
        for model in [model for model in self.models.values() if model.accepting and model.closes_at < NEVER]:
            if now < model.closes_at:
                self.wake_at = min(self.wake_at, model.closes_at)
            elif not len(model.jobs):
                model.accepting = False
                actions += self._let_held_go(model)
        for model in [model for model in self.models.values() if model.held_until < NEVER]:
            if any(model.is_last(worker) for worker in model.workers if worker.held):
                if len(model.jobs):
                    continue
                if now < model.held_until:
                    self.wake_at = min(self.wake_at, model.held_until)
                    continue
            model.held_until = NEVER
            actions += self._let_held_go(model)
        return actions

    def _let_held_go(self, model: ModelQueue) -> list[Action]:
        held = [worker for worker in model.workers if worker.held]
        return [action for worker in held for action in self._let_go(model, worker)]

    # -- workers have gone on

    def progressed(self, worker: Worker, progress: Progress, now: float) -> list[Action]:
        """Takes note of what a worker has finished."""
        model = self.models[worker.model]
        worker.done = progress.done
        was_busy = bool(worker.batches)
        if model.joins_steps:
            actions = self._note_ended(model, worker, progress.service_s, now)
        else:
            actions = self._note_done(model, worker, progress, now)
        if model.sequences is not None:
            actions.append(Fail(worker.model, model.sequences.end_marked(progress.marks), NO_WORKER))
        if was_busy and not worker.batches:
            self.busy.remove(worker)
            if worker.leaving:
                actions += self._release(model, worker)
        return actions

    def _note_done(self, model: ModelQueue, worker: Worker, progress: Progress, now: float) -> list[Action]:
        """Takes note of finished batches."""
        begun_at, service_s = progress.begun_at, progress.service_s
        actions: list[Action] = []
        again: list[Job] = []
        ended_at = min(now, begun_at + service_s)
        while worker.batches and worker.batches[0].number <= worker.done:
            batch = worker.batches.pop(0)
            worker.idle_since = now
            if model.sequences is not None:
                model.sequences.ended(batch.jobs, now)
            if batch.revoked:
                # Mostly it has been queued again already; the worker may just have begun it.
                actions += self.revoked(worker, batch)
                if not batch.jobs:
                    continue
            failed = batch.given_back() if model.halving is not None else []
            if failed:
                repeated, settle = end_of_failed(model, worker, batch, failed, batch.number == progress.oom, now)
                again += repeated
                actions.append(settle)
            else:
                model.learn(len(batch.jobs), service_s, ended_at)
            if batch.jobs:
                tells_handover = batch.alone and batch.number == worker.done and not failed
                posted_at = batch.posted_at if tells_handover else None
                actions.append(Record(worker.model, batch.jobs, ended_at, service_s, posted_at, begun_at))
        if again:
            self._active[worker.model] = model
        return actions + repeat(model, again, "its handler failed")

    def _note_ended(self, model: ModelQueue, worker: Worker, service_s: float, now: float) -> list[Action]:
        """Takes note of the requests of a continuous batch that have ended, as their slots say."""
        ended = worker.take_answered()
        if not ended:
            return []
        worker.idle_since = now
        if model.sequences is not None:
            model.sequences.ended(ended, now)
        return [Record(worker.model, ended, now, service_s)]

    # -- what no event announces

    def tick(self, now: float) -> list[Action]:
        """Answers waiting jobs whose client has gone, whose deadline has passed, or whose model has not come."""
        actions: list[Action] = [Fail(each.model, [each.job], NO_WORKER) for each in self._recovered.take_late(now)]
        for model in self.models.values():
            oldest_ns = model.oldest_in_time_ns(now)
            over = model.jobs.drop(lambda job: job.is_over(oldest_ns))  # noqa: B023 (called at once)
            if over:
                actions += end_over(model, over, oldest_ns, now)
            if model.sequences is not None:
                actions.append(Fail(model.spec.index, model.sequences.expire(now), NO_WORKER))
        return actions

    def watch(self, worker: Worker, started: int, done: int, begun_at: float, now: float) -> list[Action]:
        """Looks for batches that run too long, or are not even taken: over `responseTimeout` their worker is killed.

        `started` and `done` are the numbers of the last batches that it has begun and done, `begun_at` is when it began
        that, or the present step of a continuous batch; 0 between two steps.
        """
        if worker.killed:
            return []
        model = self.models[worker.model]
        # Of a continuous batch each step has its own time; between two steps there is none.
        runs_s = now - begun_at if begun_at > 0 and (model.joins_steps or started > done) else None
        if model.is_hung(worker, started, runs_s, now):
            worker.killed = True
            return [Kill(worker)]
        behind = model.stuck_behind(worker, started, runs_s)
        for batch in behind:
            batch.revoked = True
        return [Revoke(worker, behind)] if behind else []

    def revoked(self, worker: Worker, batch: Batch) -> list[Action]:
        """Queues a batch again that its worker had not begun and never will; its place is free when it says so."""
        model = self._active[worker.model] = self.models[worker.model]
        return requeue(model, batch.take_unbegun())

    def wanted_news(self) -> int:
        """For what the loop is to be woken, bits of `layout.News`.

        A submission can wait for the end of a batch where all workers are busy with short ones, and an end that no job
        waits for is noticed with the next submission: under load and with a single client alike, one wake in two.
        """
        # One that is not looked at waits for submissions alone.
        wanted = News.SUBMISSION if len(self._active) < len(self.models) else 0
        for model in self._active.values():
            if len(model.jobs) or not model.accepting or any(worker.leaving for worker in model.workers):
                wanted |= News.COMPLETION
                if model.service_s <= UNANNOUNCED_S and model.idle_worker() is None:
                    continue
            wanted |= News.SUBMISSION
        return wanted or News.SUBMISSION | News.COMPLETION


def _cut(model: ModelQueue, jobs: list[Job], most: int | None) -> list[Job]:
    """The first jobs, as many as may go; the others wait at the head of the queue."""
    if most is None or len(jobs) <= most:
        return jobs
    model.jobs.put_back(jobs[most:])
    return jobs[:most]
