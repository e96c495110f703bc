"""A model worker and its clients as a discrete-event simulation, driven by the real batching rules.

A batch of n takes (a + b*n) seconds, give or take 5 %. The load is a number of clients that send again some time
after their answer (closed loop), requests that come at random at a rate (open loop), or both. Time is a number: a
run of several simulated seconds takes a fraction of a real one, and the same seed gives the same result.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import NamedTuple

from wsgi_ts.batcher.scheduler.policy import BatchPolicy

#: From the end of a batch until the client's next request can be there, besides its thinking time.
NETWORK_S = 0.0002

_ARRIVAL, _DONE, _ASK = range(3)


class _Request(NamedTuple):
    came_at: float
    client: int  # -1: of the open loop, never comes back


class _Event(NamedTuple):
    at: float
    order: int
    kind: int
    client: int = -1
    answered_at: float | None = None
    batch: tuple[_Request, ...] = ()
    service_s: float = 0.0


@dataclass(frozen=True)
class Load:
    """Who asks how often: clients that think for `think_s` on average, and `rate` more requests a second."""

    clients: int = 0
    think_s: float = 0.0005
    rate: float = 0.0


@dataclass(frozen=True)
class Model:
    """What a batch costs: fixed_s + n * per_request_s seconds, and how many requests it may hold."""

    fixed_s: float
    per_request_s: float
    batch_size: int = 32


@dataclass(frozen=True)
class Outcome:
    """What came out: requests a second, percentiles of the latency in seconds, mean batch size."""

    throughput: float
    p50_s: float
    p99_s: float
    mean_batch: float
    longest_queue_s: float


class Simulation:
    """One worker, one queue, one policy."""

    def __init__(self, policy: BatchPolicy, model: Model, load: Load, seed: int = 1) -> None:
        self._policy = policy
        self._model = model
        self._load = load
        # Apart, so that the open loop's requests come at the same times whatever the policy does.
        self._arrivals = random.Random(seed)
        self._thoughts = random.Random(seed + 1)
        self._services = random.Random(seed + 2)
        self._events: list[_Event] = []
        self._order = 0
        self._now = 0.0
        self._queue: list[_Request] = []
        self._busy = False
        self._asked_for = -1.0
        self._latencies: list[float] = []
        self._sizes: list[int] = []
        self._longest_queue_s = 0.0

    def run(self, seconds: float) -> Outcome:
        """Simulates that many seconds."""
        for client in range(self._load.clients):
            self._schedule(self._thinking(), _ARRIVAL, client=client)
        if self._load.rate:
            self._schedule(self._arrivals.expovariate(self._load.rate), _ARRIVAL)
        while self._events:
            event = heapq.heappop(self._events)
            if event.at > seconds:
                break
            self._now = event.at
            if event.kind == _ARRIVAL:
                self._arrive(event)
            elif event.kind == _DONE:
                self._finish(event)
            self._dispatch()
        latencies = sorted(self._latencies)
        return Outcome(
            throughput=len(latencies) / seconds,
            p50_s=latencies[len(latencies) // 2],
            p99_s=latencies[int(len(latencies) * 0.99)],
            mean_batch=sum(self._sizes) / len(self._sizes),
            longest_queue_s=self._longest_queue_s,
        )

    def _arrive(self, event: _Event) -> None:
        returning = event.answered_at is not None
        idle_s = self._now - event.answered_at if event.answered_at is not None else 0.0
        self._queue.append(_Request(self._now, event.client))
        self._policy.on_arrival(self._now, 1, idle_s, int(returning))
        if event.client < 0:
            self._schedule(self._arrivals.expovariate(self._load.rate), _ARRIVAL)

    def _finish(self, event: _Event) -> None:
        self._busy = False
        self._policy.on_batch(len(event.batch), event.service_s)
        self._policy.on_answered(self._now, len(event.batch))
        for request in event.batch:
            self._latencies.append(self._now - request.came_at)
            if request.client >= 0:
                delay = NETWORK_S + self._thinking()
                self._schedule(delay, _ARRIVAL, client=request.client, answered_at=self._now)

    def _dispatch(self) -> None:
        if self._busy or not self._queue:
            return
        oldest_at = self._queue[0].came_at
        wait = self._policy.decide(self._now, len(self._queue), oldest_at, self._model.batch_size)
        if wait > 0.0:
            if self._asked_for != self._now + wait:
                self._asked_for = self._now + wait
                self._schedule(wait, _ASK)
            return
        batch = tuple(self._queue[: self._model.batch_size])
        del self._queue[: len(batch)]
        self._busy = True
        self._sizes.append(len(batch))
        self._longest_queue_s = max(self._longest_queue_s, self._now - oldest_at)
        exact = self._model.fixed_s + self._model.per_request_s * len(batch)
        service_s = exact * self._services.uniform(0.95, 1.05)
        self._schedule(service_s, _DONE, batch=batch, service_s=service_s)

    def _thinking(self) -> float:
        return self._thoughts.expovariate(1.0 / self._load.think_s)

    def _schedule(
        self,
        delay: float,
        kind: int,
        *,
        client: int = -1,
        answered_at: float | None = None,
        batch: tuple[_Request, ...] = (),
        service_s: float = 0.0,
    ) -> None:
        self._order += 1
        event = _Event(self._now + delay, self._order, kind, client, answered_at, batch, service_s)
        heapq.heappush(self._events, event)
