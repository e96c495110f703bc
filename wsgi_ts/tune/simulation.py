"""Model workers, their batcher and its clients as a discrete-event simulation, driven by the server's own scheduler.

A batch of n takes (a + b*n) seconds, give or take 5 % or as much as was measured. The load is a number of clients that
send again some time after their answer (closed loop), requests that come at random at a rate (open loop), or both. The
batcher sleeps and is woken as the real one: only for the news that its scheduler wants. Time is a number: the same seed
gives the same result, and the open loop's requests come at the same times whatever the rule does.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from wsgi_ts.batcher.scheduler.actions import Dispatch
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.loop import TICK_S
from wsgi_ts.batcher.scheduler.model_queue import Batch, Worker
from wsgi_ts.batcher.scheduler.policy import make_policy
from wsgi_ts.batcher.scheduler.scheduler import UNANNOUNCED_S, Scheduler
from wsgi_ts.batcher.shm.layout import NOT_RETURNING, News
from wsgi_ts.batcher.shm.worker_layout import Progress
from wsgi_ts.messages import ModelSpec

#: From the end of a batch until the client's next request can be there, besides its thinking time.
NETWORK_S = 0.0002
#: From news until the batcher, which slept, acts on it, and from its decision until an idle model worker begins.
WAKE_S = 0.00003

_ARRIVAL, _DONE, _TURN = range(3)
_OPEN_LOOP = -1


@dataclass(frozen=True)
class Model:
    """What a batch costs: fixed_s + n * per_request_s seconds, and how many requests it may hold.

    Attributes:
        measured: sizes and seconds, by size, where these were measured: what lies between them is taken from them.
    """

    fixed_s: float
    per_request_s: float
    batch_size: int = 32
    measured: tuple[tuple[int, float], ...] = ()

    def cost_s(self, n: int) -> float:
        """Seconds that a batch of `n` takes."""
        for (size, seconds), (larger, longer_s) in pairwise(self.measured):
            if size <= n <= larger:
                return seconds + (longer_s - seconds) * (n - size) / (larger - size)
        return self.fixed_s + n * self.per_request_s

    @property
    def capacity(self) -> float:
        """Requests a second with full batches."""
        return self.batch_size / self.cost_s(self.batch_size)


@dataclass(frozen=True)
class Load:
    """Who asks how often.

    Attributes:
        clients: how many send their next request some time after the answer to the last one.
        think_s: that time, on average.
        rate: requests a second that come at random, whatever the server does.
        pool: kept connections that these come over, the one that has been idle longest first; more are opened when all
            are in use. 0: each request has a connection of its own.
    """

    clients: int = 0
    think_s: float = 0.0005
    rate: float = 0.0
    pool: int = 0


@dataclass(frozen=True)
class Rule:
    """A batching rule, as a model's settings say it."""

    policy: str = "adaptive"
    batch_size: int = 32
    max_delay_s: float = 0.1


class _Event(NamedTuple):
    at: float
    order: int
    kind: int
    client: int = _OPEN_LOOP
    idle_s: float = -1.0  # since the connection's last answer; -1: its first request
    service_s: float = 0.0
    worker: int = 0


class _Slots:
    """The segment that all jobs lie in: nobody has gone."""

    mail_base = 0
    retired = False

    def __init__(self) -> None:
        self.states = self.cancels = memoryview(bytes(8)).cast("Q")

    def ids(self, slot: int) -> tuple[str, str]:
        return "", str(slot)

    def head(self, slot: int) -> tuple[bytes, int]:
        return b"", 0

    def fail(self, slot: int, status: int, text: str, batch: bytes) -> None:
        raise AssertionError(f"slot {slot} is answered {status}: {text}")

    def settle(self, slot: int) -> None:
        raise AssertionError(f"slot {slot} is answered with an error")

    def claim_again(self, slot: int) -> None:
        raise AssertionError(f"slot {slot} is to be run again")


@dataclass(eq=False)
class _ModelWorker:
    """A model worker; the first batch of its mailbox runs, those that have ended are not seen by the batcher yet."""

    handle: Worker
    mailbox: deque[Batch]
    ended: list[tuple[int, float, float]]  # number, begun at, service time


class Simulation:
    """One queue, one rule.

    Args:
        seed: of all that is random.
        noise: what a batch took as a part of what it should have, measured; one is drawn for each batch.

    Attributes:
        now: the simulated time, in seconds.
        counted_from: when the part of a run began that counts.
    """

    def __init__(
        self, rule: Rule, model: Model, load: Load, seed: int = 1, workers: int = 1, noise: Sequence[float] = ()
    ) -> None:
        spec = ModelSpec(0, "m", "1", "", "", None, batch_size=min(rule.batch_size, model.batch_size),
                         job_queue_size=1_000_000)  # fmt: skip
        self._scheduler = Scheduler(0.0)
        self._scheduler.load_model(spec, 0.0)
        # Not by the spec, which knows whole milliseconds only.
        self._scheduler.models[0].policy = make_policy(rule.policy, rule.max_delay_s)
        self._workers = [_ModelWorker(Worker(number, 0, 0), deque(), []) for number in range(workers)]
        for worker in self._workers:
            self._scheduler.worker_ready(worker.handle, 0.0)
        self._noise = noise
        self._costs = [model.cost_s(n) for n in range(spec.batch_size + 1)]
        self._load = load
        # Apart, so that the open loop's requests come at the same times whatever the rule does.
        self._arrivals = random.Random(seed)
        self._thoughts = random.Random(seed + 1)
        self._services = random.Random(seed + 2)
        self._segment = _Slots()
        self._events: list[_Event] = []
        self._order = 0
        self.now = self.counted_from = 0.0
        self._wanted = News.SUBMISSION | News.COMPLETION
        self._wakes_at = math.inf
        self._submitted: list[Job] = []
        self._pool = deque([-1.0] * load.pool)  # when the idle connections had their last answer; -1: never
        self._latencies: list[float] = []

    def latencies_s(
        self, requests: int, warm_up: int = 0, *, give_up_above_s: float = math.inf, most_late: int = 0
    ) -> list[float]:
        """The latencies, in seconds, sorted, of so many requests, after `warm_up` more that do not count.

        The run ends when more than `most_late` of them are above a limit: there they all are late, and say no more.
        """
        for client in range(self._load.clients):
            self._schedule(self._thinking(), _ARRIVAL, client)
        if self._load.rate:
            self._schedule(self._arrivals.expovariate(self._load.rate), _ARRIVAL)
        counts = not warm_up
        late = looked_at = 0
        while len(self._latencies) < requests and late <= most_late:
            event = heapq.heappop(self._events)
            self.now = event.at
            if event.kind == _ARRIVAL:
                self._arrive(event)
            elif event.kind == _DONE:
                self._finish(event)
                if not counts and len(self._latencies) >= warm_up:
                    counts, self.counted_from = True, self.now
                    self._latencies, looked_at = [], 0
                elif counts:
                    late += sum(each > give_up_above_s for each in self._latencies[looked_at:])
                    looked_at = len(self._latencies)
            elif event.at == self._wakes_at:  # no other turn has come between
                self._turn()
        return sorted(self._latencies)

    # -- clients

    def _arrive(self, event: _Event) -> None:
        now, idle_s = self.now, event.idle_s
        if event.client == _OPEN_LOOP:
            self._schedule(self._arrivals.expovariate(self._load.rate), _ARRIVAL)
            answered_at = self._pool.popleft() if self._pool else -1.0
            idle_s = now - answered_at if answered_at >= 0.0 else -1.0
        idle_us = int(idle_s * 1e6) if idle_s >= 0.0 else NOT_RETURNING
        self._submitted.append(Job(self._segment, 0, event.client, int(now * 1e9), False, now, idle_us))
        self._news(News.SUBMISSION)

    def _answer(self, job: Job) -> None:
        client = job.generation
        if client != _OPEN_LOOP:
            delay_s = NETWORK_S + self._thinking()
            self._schedule(delay_s, _ARRIVAL, client, idle_s=delay_s)
        elif len(self._pool) < self._load.pool:
            self._pool.append(self.now)

    def _thinking(self) -> float:
        return self._thoughts.expovariate(1.0 / self._load.think_s) if self._load.think_s else 0.0

    # -- the model workers

    def _begin(self, worker: _ModelWorker, delay_s: float) -> None:
        exact = self._costs[len(worker.mailbox[0].jobs)]
        service_s = exact * (self._services.choice(self._noise) if self._noise else self._services.uniform(0.95, 1.05))
        self._schedule(delay_s + service_s, _DONE, service_s=service_s, worker=worker.handle.worker_id)

    def _finish(self, event: _Event) -> None:
        worker = self._workers[event.worker]
        batch = worker.mailbox.popleft()
        worker.ended.append((batch.number, self.now - event.service_s, event.service_s))
        if worker.mailbox:
            self._begin(worker, 0.0)
        self._latencies += [self.now - job.came_at for job in batch.jobs]
        for job in batch.jobs:
            self._answer(job)
        self._news(News.COMPLETION)

    # -- the batcher, as `BatcherLoop.turn` and `_sleep` have it

    def _news(self, kind: int) -> None:
        if self._wanted & kind:
            self._wake_at(self.now + WAKE_S)

    def _wake_at(self, at: float) -> None:
        if at < self._wakes_at:
            self._wakes_at = at
            self._schedule(at - self.now, _TURN)

    def _turn(self) -> None:
        now, scheduler = self.now, self._scheduler
        for worker in self._workers:
            if worker.ended:
                for number, begun_at, service_s in worker.ended:
                    scheduler.progressed(worker.handle, Progress(number, begun_at, service_s), now)
                worker.ended = []
        if self._submitted:
            submitted, self._submitted = self._submitted, []
            scheduler.arrived(0, submitted, now)
        for action in scheduler.dispatch(now):
            assert isinstance(action, Dispatch), action
            self._post(self._workers[action.worker.worker_id], action.batch)
        self._wanted = scheduler.wanted_news()
        limit_s = min(TICK_S, scheduler.wake_at - now)
        if not self._wanted & News.SUBMISSION:
            limit_s = min(limit_s, UNANNOUNCED_S)
        self._wakes_at = math.inf
        self._wake_at(now + max(limit_s, 1e-6))

    def _post(self, worker: _ModelWorker, batch: Batch) -> None:
        worker.mailbox.append(batch)
        if len(worker.mailbox) == 1:
            self._begin(worker, WAKE_S)

    def _schedule(
        self,
        delay: float,
        kind: int,
        client: int = _OPEN_LOOP,
        *,
        idle_s: float = -1.0,
        service_s: float = 0.0,
        worker: int = 0,
    ) -> None:
        self._order += 1
        heapq.heappush(self._events, _Event(self.now + delay, self._order, kind, client, idle_s, service_s, worker))
