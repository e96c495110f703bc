"""The models and model workers that a batcher has: how they come, how they leave, and how they end.

A worker that is to leave gets no further batch and goes after those that it has. A version that is unregistered takes
jobs for a moment longer and keeps its workers until they have served what it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from wsgi_ts.batcher.scheduler.counters import ModelCounters
from wsgi_ts.batcher.scheduler.dispatch import ModelQueue, WorkerSeat
from wsgi_ts.batcher.scheduler.hand_over import HandOver
from wsgi_ts.batcher.scheduler.sources import Sources
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.batcher.shm.mailbox import BatcherMailbox
from wsgi_ts.messages import ModelSpec

#: How long a version that is unregistered still takes jobs: a web worker may have looked at its routes just before.
LAST_ARRIVALS_S = 0.05


class Roster:
    """Who is there; adds to and removes from `queues`.

    Args:
        queues: the queues by model index.
        sources: the attached segments.
        hand_over: the batches that the workers have.
        counters_of: a model's counters by its index.
        notify: called with ("model_unloaded", model index) and ("worker_released", worker id, start count).

    Attributes:
        closing: the queues of unregistered versions that still have jobs, or may get some.
    """

    def __init__(
        self,
        queues: dict[int, ModelQueue],
        sources: Sources,
        hand_over: HandOver,
        counters_of: Callable[[int], ModelCounters],
        notify: Callable[[tuple[Any, ...]], None],
    ) -> None:
        self.closing: list[ModelQueue] = []
        self._queues = queues
        self._seats: dict[int, WorkerSeat] = {}
        self._sources = sources
        self._hand_over = hand_over
        self._counters_of = counters_of
        self._notify = notify

    # -- models

    def load_model(self, spec: ModelSpec) -> None:
        """Opens the queue of a model version, with the jobs that were found before it was known."""
        if spec.index not in self._queues:
            queue = self._queues[spec.index] = ModelQueue(spec, self._counters_of(spec.index))
            self._sources.take_in_orphans(queue, time.monotonic())

    def unload_model(self, index: int) -> None:
        """Begins the end of a model version: what has arrived, or arrives in the next moment, is still served."""
        queue = self._queues.get(index)
        if queue is None:
            self._notify(("model_unloaded", index))
            return
        if queue not in self.closing:
            queue.closes_at = time.monotonic() + LAST_ARRIVALS_S
            self.closing.append(queue)
        self._forget_if_empty(queue)

    def close_served(self, now: float) -> float:
        """Lets the workers of unregistered versions go where nothing waits for them and nothing can come any more.

        Returns:
            When to call next (monotonic seconds), if nothing else happens before.
        """
        next_at = math.inf
        for queue in tuple(self.closing):
            if now < queue.closes_at:
                next_at = min(next_at, queue.closes_at)
            elif not len(queue.jobs):
                queue.accepting = False
                self.closing.remove(queue)
                for seat in queue.held:
                    self._let_go(seat)
                queue.held.clear()
        return next_at

    def _forget_if_empty(self, queue: ModelQueue) -> None:
        """Ends an unregistered version that has no workers any more; what still waits for one is answered."""
        if queue.closes_at < math.inf and not queue.seats:
            self._sources.refuse(queue.jobs.take(len(queue.jobs)))
            if queue in self.closing:
                self.closing.remove(queue)
            self._queues.pop(queue.spec.index, None)
            queue.counters.clear_gauges()
            self._notify(("model_unloaded", queue.spec.index))

    # -- workers

    def worker_ready(self, worker_id: int, start_count: int, model_index: int, mailbox: BatcherMailbox) -> None:
        """Takes in a worker that has loaded its model; one whose model is gone is let go at once."""
        seat = self._seats[worker_id] = WorkerSeat(worker_id, start_count, model_index, mailbox)
        queue = self._queues.get(model_index)
        if queue is None:
            self.release(seat)
        else:
            seat.idle_since = time.monotonic()
            queue.seats.append(seat)
            _show_workers(queue)

    def release_worker(self, worker_id: int, start_count: int) -> None:
        """Lets a worker go when it has done what it has; that of an unregistered version when all is served."""
        seat = self._seats.get(worker_id)
        if seat is None or seat.start_count != start_count:
            self._notify(("worker_released", worker_id, start_count))
            return
        queue = self._queues[seat.model_index]
        if queue in self.closing:
            queue.held.append(seat)
        else:
            self._let_go(seat)

    def _let_go(self, seat: WorkerSeat) -> None:
        """Gives a worker no further batch; it leaves after those that it has, and takes its sequences along."""
        seat.leaving = True
        queue = self._queues[seat.model_index]
        if queue.sequences is not None:
            self._sources.refuse(queue.sequences.end_those_of(seat.worker_id))
        _show_workers(queue)
        if not seat.batches:
            self.release(seat)

    def release(self, seat: WorkerSeat) -> None:
        """Lets an idle worker go: its mailbox says stop, it leaves by itself."""
        self._seats.pop(seat.worker_id, None)
        queue = self._queues.get(seat.model_index)
        if queue is not None and seat in queue.seats:
            queue.seats.remove(seat)
        seat.mailbox.stop()  # type: ignore[attr-defined]
        self._notify(("worker_released", seat.worker_id, seat.start_count))
        if queue is not None:
            self._forget_if_empty(queue)

    def worker_gone(self, worker_id: int, start_count: int, oom: bool, mailbox: BatcherMailbox) -> None:
        """Answers what a dead worker had begun; what it had not begun waits for the next one.

        Args:
            worker_id: the worker.
            start_count: which life of it has ended.
            oom: whether it ran out of memory.
            mailbox: that life's mailbox, which is removed.
        """
        seat = self._seats.get(worker_id)
        if seat is not None and seat.start_count == start_count:
            del self._seats[worker_id]
            self._strike_out(seat, oom)
        mailbox.remove()

    def _strike_out(self, seat: WorkerSeat, oom: bool) -> None:
        queue = self._queues.get(seat.model_index)
        self._hand_over.settle(queue, seat, oom, time.monotonic())
        if queue is None:
            return
        if queue.sequences is not None:
            self._sources.refuse(queue.sequences.end_those_of(seat.worker_id))
        queue.seats.remove(seat)
        if seat in queue.held:
            queue.held.remove(seat)
        _show_workers(queue)
        self._forget_if_empty(queue)


def _show_workers(queue: ModelQueue) -> None:
    queue.counters.show(ModelWord.READY_WORKERS, queue.workers)
