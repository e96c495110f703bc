"""The queue of a model whose batches a plugin forms: which requests go together is its word, all else is as ever.

Sizes, delays and workers stay the batcher's: a batch never has more than `batchSize` requests, and never waits longer
than `maxBatchDelay` after its oldest request came.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from wsgi_ts.batcher.scheduler.job import Job, JobQueue
from wsgi_ts.batcher.scheduler.model_queue import NEVER, ModelQueue, NextBatch
from wsgi_ts.batcher.scheduler.policy import CloseReason
from wsgi_ts.messages import ModelSpec
from wsgi_ts.plugins.api import BatchHead, ModelState, QueueState
from wsgi_ts.plugins.batching import BatchingRules


class Group:
    """Waiting requests that would go together.

    Attributes:
        jobs: the requests, oldest first.
        cost: their summed cost.
        is_full: nothing more joins it.
    """

    __slots__ = ("cost", "is_full", "jobs")

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cost = 0.0
        self.is_full = False


class KeyedQueue(JobQueue):
    """A job queue that knows each request's key and cost."""

    def __init__(self, capacity: int, rules: BatchingRules, head_of: Callable[[Job], BatchHead]) -> None:
        super().__init__(capacity)
        self._rules = rules
        self._head_of = head_of
        self._known: dict[Job, tuple[Hashable, float]] = {}

    def groups(self, most: int) -> list[Group]:
        """The batches that the waiting requests would make, each of at most so many, the oldest first."""
        rules = self._rules
        by_key: dict[Hashable, Group] = {}
        for job in self._jobs:
            key, cost = self._said_of(job)
            group = by_key.setdefault(key, Group())
            if group.is_full:
                continue
            if group.jobs and not rules.admit(group.cost, len(group.jobs), cost):
                group.is_full = True
                continue
            group.jobs.append(job)
            group.cost += cost
            group.is_full = len(group.jobs) >= most
        return list(by_key.values())

    def take(self, count: int) -> list[Job]:
        """Removes the first `count` jobs, whatever their keys."""
        jobs = super().take(count)
        for job in jobs:
            self._known.pop(job, None)
        return jobs

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Removes and returns the jobs for which `unwanted` holds."""
        dropped = super().drop(unwanted)
        for job in dropped:
            self._known.pop(job, None)
        return dropped

    def _said_of(self, job: Job) -> tuple[Hashable, float]:
        known = self._known.get(job)
        if known is None:
            head = self._head_of(job)
            known = self._known[job] = self._rules.key(head), self._rules.cost(head)
        return known


class PluginQueue(ModelQueue):
    """A model version with a batching plugin; once that is switched off, one without.

    Args:
        spec: the model version; no continuous batches, sequences or tickets.
    """

    def __init__(self, spec: ModelSpec, rules: BatchingRules, head_of: Callable[[Job], BatchHead]) -> None:
        super().__init__(spec)
        self._rules = rules
        self._keyed = KeyedQueue(spec.job_queue_size, rules, head_of)
        self.jobs = self._keyed

    def next_batch(self, now: float) -> NextBatch | None:
        """Takes from the queue what goes to a worker now; None when nothing does."""
        self.wait_until = NEVER
        worker = self.idle_worker()
        is_idle = worker is not None
        worker = worker or self._worker_to_prefetch()
        if worker is None:
            return None
        most = min(self.batch_size, worker.capacity)
        going = self._group_to_go(now, most, is_idle=is_idle) if self._rules.is_on else None
        # Asked last: what has been switched off just now has said nothing.
        if not self._rules.is_on:
            return super().next_batch(now)
        if going is None:
            return None
        jobs, reason = going
        self._keyed.drop(set(jobs).__contains__)
        return worker, jobs, reason

    def _group_to_go(self, now: float, most: int, *, is_idle: bool) -> tuple[list[Job], int] | None:
        """The batch of at most `most` that goes now, a full one where the worker is not idle, and why it goes.

        Full ones go first, the oldest of them; but nobody waits longer than maxBatchDelay for that. Where none goes
        it sets `wait_until`.
        """
        groups = self._keyed.groups(most)
        max_delay_s = self.spec.max_batch_delay_ms / 1000
        late = next((each for each in groups if now - each.jobs[0].came_at >= max_delay_s), None)
        full = next((each for each in groups if each.is_full), None)
        if full is not None and (late is None or not is_idle):
            # One that has room is full because the plugin admits no more.
            return full.jobs, CloseReason.FULL if len(full.jobs) >= most else CloseReason.PLUGIN
        if not is_idle:
            return None
        if late is not None:
            return late.jobs, CloseReason.DELAY
        for group in groups:
            wait_s = self._wait_s(group, max_delay_s, now)
            if wait_s <= 0.0:
                return group.jobs, CloseReason.PLUGIN if self._rules.has_wait else self.policy.reason
            self.wait_until = min(self.wait_until, now + wait_s)
        return None

    def _wait_s(self, group: Group, max_delay_s: float, now: float) -> float:
        oldest_at = group.jobs[0].came_at
        if not self._rules.has_wait:
            return self.policy.decide(now, len(group.jobs), oldest_at, self.batch_size)
        oldest_s = now - oldest_at
        queue = QueueState(len(group.jobs), group.cost, oldest_s, len(self.jobs))
        model = ModelState(self.batch_size, max_delay_s, self.service_s)
        return min(self._rules.wait(queue, model), max_delay_s - oldest_s)


def head_of(job: Job) -> BatchHead:
    """What a policy may know of a request: its header lines and the length of its body."""
    head, body_bytes = job.segment.head(job.slot)
    headers: dict[str, str] = {}
    for line in head.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
    return BatchHead(headers, body_bytes)
