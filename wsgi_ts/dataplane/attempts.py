"""The requests of workflows' nodes: attempts, each with a limit of time, in slots like all other requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.layout import WorkflowWord
from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.node_requests import references
from wsgi_ts.dataplane.retry_after import RetryAfter
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.task import Action, Task
from wsgi_ts.dataplane.walk import Walk
from wsgi_ts.dataplane.walk_counters import WalkCounters
from wsgi_ts.errors import InternalServerError, OutOfResources, ServerError, ServiceUnavailable

log = logging.getLogger(__name__)

Waiter = TypeVar("Waiter")


class Attempts(Generic[Waiter]):
    """The attempts of all walks of one exchange; used on its thread.

    Args:
        node_target: where a request from one node to another goes, by model and version.

    Attributes:
        client: the slots.
        waiting: who waits for each request, by slot or handle; see `Exchange`.
        counters: where they are counted.
        steps: of each slot of a walk its walk and task.
        limit: says when a request is to be looked at, by monotonic time in ns, where that is earlier than was said.
    """

    def __init__(
        self,
        client: SlotClient,
        node_target: Callable[[str, str | None], Target],
        waiting: dict[int, Any],
        choose: Callable[[Target], int],
        counters: WalkCounters,
        retry_after: RetryAfter,
    ) -> None:
        self.steps: dict[int, tuple[Walk[Waiter], Task]] = {}
        self.limit: Callable[[Waiter, int], None] = lambda waiter, limit_ns: None
        self.client = client
        self._node_target = node_target
        self.waiting = waiting
        self._choose = choose
        self.counters = counters
        self._retry_after = retry_after

    def put(self, slot: int, target: Target, request: Request) -> None:
        """Submits a request in a slot that was taken for it.

        Raises:
            SharedMemoryFull: there is no room for the request; the slot is still the caller's.
        """
        self.client.submit(slot, self._choose(target), request)

    def submit(self, walk: Walk[Waiter], task: Task) -> list[Action]:
        """Submits a task's next attempt; returns what follows where that cannot be done."""
        states, client = walk.states, self.client
        if states.is_over:
            return states.refused(task)
        node = states.graph.nodes[task.node]
        target = self._node_target(node.when if task.is_gate else node.model, node.version)
        if target.error is not None:
            task.error = self._unreachable(walk, task, target.error)
            return states.refused(task)
        now_ns = time.monotonic_ns()
        if task.slot >= 0:
            # What the last attempt has begun to answer counts no more.
            task.value = task.parts = None
            client.submit_again(task.slot, self._choose(target), target.model, now_ns)
            log.info("Invoking -  %s for attempt %d", node.name, task.attempt - 1)
            self.counters.count(states.graph.index, WorkflowWord.RETRIES)
        else:
            slot = client.take(target.model)
            if slot is None:
                task.error = ServiceUnavailable.no_slot(target.model_name, target.version)
                task.error.retry_after_s = self._retry_after.seconds(target, now_ns)
                return states.refused(task)
            body = references(states, task, walk.first_slot)
            try:
                self.put(slot, target, Request(target, walk.request_id, walk.head, b"", body, len(body), now_ns))
            except SharedMemoryFull as full:
                client.abandon(slot)
                log.error("%s", full.strerror)
                task.error = OutOfResources("Not enough shared memory for the request")
                return states.refused(task)
            task.slot = slot
        self.begun(walk, task, now_ns)
        return []

    def begun(self, walk: Walk[Waiter], task: Task, now_ns: int) -> None:
        """Notes that an attempt was submitted; of a task that has no limit yet, its time begins."""
        self.waiting[task.slot] = None
        self.steps[task.slot] = walk, task
        if not task.began_ns:
            task.began_ns = now_ns
        if not task.limit_ns:
            self.begin_time(walk, task, now_ns)

    def begin_time(self, walk: Walk[Waiter], task: Task, now_ns: int) -> None:
        """Has the time of a task's attempt begin, which its node limits."""
        task.limit_ns = now_ns + walk.states.graph.nodes[task.node].timeout_ms * 1_000_000
        if task.limit_ns < walk.limit_ns:
            walk.limit_ns = task.limit_ns
            self.limit(walk.waiter, walk.limit_ns)

    def take_slot(self, task: Task) -> int:
        """Takes a task's slot away from it, for its answer to be sent from there; -1 where it has none."""
        slot, task.slot = task.slot, -1
        if slot >= 0:
            del self.steps[slot]
        return slot

    def release(self, task: Task) -> None:
        """Gives a task's slot back, if it has one."""
        slot = self.take_slot(task)
        if slot >= 0:
            self.waiting.pop(slot, None)
            self.client.release(slot)

    def no_worker(self, walk: Walk[Waiter], task: Task) -> ServerError:
        """Returns the error of a task whose model has no worker, or a full queue."""
        node = walk.states.graph.nodes[task.node]
        name = node.when if task.is_gate else node.model
        error = ServiceUnavailable.busy_node(name)
        target = self._node_target(name, node.version)
        if target.error is None:
            error.retry_after_s = max(error.retry_after_s, self._retry_after.seconds(target, time.monotonic_ns()))
        return error

    def _unreachable(self, walk: Walk[Waiter], task: Task, error: ServerError) -> ServerError:
        """Returns the error of a task whose model has no worker, or was unregistered behind the workflow's back."""
        if isinstance(error, ServiceUnavailable):
            return self.no_worker(walk, task)
        return InternalServerError(walk.states.graph.nodes[task.node].model)
