"""The workflow requests that one process has under way: carries out what each one's `GraphWalk` decides.

Nodes are requests like all others, in slots of the process's own segment. What goes from node to node stays where its
model worker has written it; only its place is read and written here (batcher/README.md, rules 14 to 17).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from wsgi_ts.batcher.shm.layout import ResponseFlag, SlotState, WorkflowWord
from wsgi_ts.batcher.shm.request_codec import Answer, Request, packed_times, read_times
from wsgi_ts.dataplane.attempts import Attempts
from wsgi_ts.dataplane.graph import TELL, Graph
from wsgi_ts.dataplane.node_answers import joined, json_parts, packed_parts
from wsgi_ts.dataplane.node_requests import inline_answer
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.task import Action, Finish, Release, State, Submit, Task, Withdraw
from wsgi_ts.dataplane.walk import Walk
from wsgi_ts.errors import BadRequest, InternalServerError, handler_error

log = logging.getLogger(__name__)

Waiter = TypeVar("Waiter")

JSON_TYPE = ("content-type", "application/json")
_FALSE = (b"", b"0")
_OK, _CLIENT_GONE = 200, 499
#: TorchServe's words for a failed attempt that another one follows, whatever has made it fail.
_AGAIN = "Timed out while executing %s for attempt %d"
#: So much of an error's text stands in the log.
_MOST_LOGGED = 500


class Walks(Generic[Waiter]):
    """The walks of one exchange; used on its thread.

    Args:
        attempts: the requests of the walks' nodes.
        most_answer_bytes: of an answer that is put together of several.

    Attributes:
        deliver: answers a request with what lies in no slot.
        progress: tells who waits for a walk that is watched of a node that has ended, by name and task.
        has_traces: how each node was run is noted.
    """

    def __init__(self, attempts: Attempts[Waiter], most_answer_bytes: int) -> None:
        self.attempts = attempts
        self.deliver: Callable[[Waiter, Answer], None] = lambda waiter, answer: None
        self.progress: Callable[[Waiter, str, Task], None] = lambda waiter, name, task: None
        self._client = attempts.client
        self._waiting = attempts.waiting
        self._most_answer_bytes = most_answer_bytes
        self._counters = attempts.counters
        self._by_handle: dict[int, Walk[Waiter]] = {}
        self._number = attempts.client.capacity
        self.has_traces = False
        self._ended: dict[int, tuple[Walk[Waiter], str]] = {}

    def begin(self, slot: int, waiter: Waiter, target: Target, graph: Graph, request: Request) -> int:
        """Submits the first node's request.

        The slot is from `SlotClient.take`, for the first node's model.

        Returns:
            The handle: a number that no slot has.

        Raises:
            SharedMemoryFull: there is no room for the request; the slot is still the caller's.
        """
        self.attempts.put(slot, target, request)
        self._number += 1
        walk = Walk(self._number, waiter, target, graph, request)
        task = walk.states.begin()
        task.slot = walk.first_slot = slot
        walk.limit_ns = request.arrival_ns + graph.nodes[task.node].timeout_ms * 1_000_000
        if walk.deadline_ns:
            walk.limit_ns = min(walk.limit_ns, walk.deadline_ns)
        self._by_handle[walk.handle] = walk
        self._waiting[walk.handle] = waiter
        self.attempts.begun(walk, task, request.arrival_ns)
        return walk.handle

    def take_news(self, slot: int) -> tuple[int, Waiter] | None:
        """Goes on with the walk that an answered slot belongs to.

        Returns:
            The slot with the whole answer and who waits for it, once there is one.
        """
        walk, task = self.attempts.steps[slot]
        client = self._client
        state = client.state(slot)
        if state == SlotState.STREAMING:
            if walk.states.is_last(task):
                return self._pass_on(walk, task)
            self._take_chunks(task)
            return None
        offset, length, status, flags = client.answer_range(slot)
        client.keep_for_sending(slot)
        task.place = offset, length
        now_ns = time.monotonic_ns()
        task.took_ns = now_ns - task.began_ns
        if self.has_traces:
            task.facts = packed_times(client.segment, slot)
        is_stream = bool(flags & ResponseFlag.STREAMED)
        is_passed_on = is_stream and state == SlotState.DONE and walk.states.is_last(task)
        if state == SlotState.FAILED or not status:
            actions = self._failed(walk, task, status, flags, offset, length)
        else:
            if is_stream and not is_passed_on:
                self._take_chunks(task)
                task.value = task.value or b""
            actions = self._answered(walk, task, offset, length)
            if is_passed_on and walk.states.decided is not None:
                walk.states.decided.clear()  # the client gets its stream
        return self._carry_out(walk, actions)

    def answer(self, slot: int, answer: Answer) -> Answer:
        """Turns the last node's answer into the workflow's: only its body counts, unless it is a stream."""
        answer.walk, timings = self._ended.pop(slot, (None, ""))
        if answer.stream is None:
            answer.status, answer.phrase, answer.headers = 200, "", []
        if not any(name.lower() == JSON_TYPE[0] for name, _ in answer.headers):
            answer.headers.append(JSON_TYPE)
        if timings:
            answer.headers.append(("server-timing", timings))
        return answer

    def look(self, handle: int) -> int:
        """Checks the time limits of a walk.

        Returns:
            When to look again, by monotonic time in ns; 0 where the request is answered.
        """
        walk = self._by_handle.get(handle)
        if walk is None:
            return 0
        now_ns = time.monotonic_ns()
        if walk.deadline_ns and now_ns >= walk.deadline_ns:
            self._deliver(walk, Answer(walk.lateness()))
            self._carry_out(walk, walk.states.stop())
            return 0
        for task in list(walk.states.tasks()):
            if task.is_open and task.limit_ns <= now_ns and task.state in (State.RUNNING, State.WITHDRAWN):
                node = walk.states.graph.nodes[task.node]
                if task.attempt <= node.retries:
                    log.error(_AGAIN, node.name, task.attempt - 1)
                else:
                    log.error("%s : it has not answered within %d ms", node.name, node.timeout_ms)
                self._counters.count(walk.states.graph.index, WorkflowWord.TIMEOUTS)
                self.attempts.begin_time(walk, task, now_ns)
                task.took_ns = now_ns - task.began_ns
                self._carry_out(walk, walk.states.timed_out(task), in_slot=False)
        self._client.publish()
        if handle not in self._by_handle:
            return 0
        limits = [task.limit_ns for task in walk.states.tasks() if task.state in (State.RUNNING, State.WITHDRAWN)]
        walk.limit_ns = min([*limits, *([walk.deadline_ns] if walk.deadline_ns else [])], default=now_ns)
        return walk.limit_ns

    def limit_of(self, handle: int) -> int:
        """When to check a walk's limits next, by monotonic time in ns; 0 where the request is answered."""
        walk = self._by_handle.get(handle)
        return 0 if walk is None else walk.limit_ns

    def watch(self, handle: int) -> None:
        """Has progress told: who waits hears of each node that ends."""
        self._by_handle[handle].states.decided = []

    def leave(self, handle: int) -> None:
        """Nobody waits for a walk any more: what has not begun is never run."""
        walk = self._by_handle.pop(handle, None)
        self._waiting.pop(handle, None)
        if walk is not None:
            self._count(walk, _CLIENT_GONE)
            self._carry_out(walk, walk.states.stop())

    # -- carrying out

    def _carry_out(
        self, walk: Walk[Waiter], actions: list[Action], *, in_slot: bool = True
    ) -> tuple[int, Waiter] | None:
        """Does what a walk has decided; returns the slot and the waiter where that is the answer.

        Without `in_slot` the caller cannot take the answer out of a slot: it is delivered.
        """
        landed = None
        to_do = deque(actions)
        while to_do:
            if walk.states.decided:
                self._tell(walk)
            action = to_do.popleft()
            if isinstance(action, Finish):
                landed = self._finish(walk, action.tasks, in_slot=in_slot)
            elif isinstance(action, Submit):
                to_do += self.attempts.submit(walk, action.task)
            elif isinstance(action, Withdraw):
                if action.task.slot >= 0:
                    self._client.cancel(action.task.slot)
            elif isinstance(action, Release):
                self.attempts.release(action.task)
            else:
                name = walk.states.graph.nodes[action.task.node].name
                error = action.task.error or InternalServerError(f"Error executing {name}")
                self._deliver(walk, Answer(error))
        if walk.states.decided:
            self._tell(walk)
        return landed

    def _tell(self, walk: Walk[Waiter]) -> None:
        """Tells who waits how nodes have ended, before the answer is on its way."""
        decided = walk.states.decided
        while decided and walk.handle in self._by_handle:
            task = decided.pop(0)
            self.progress(walk.waiter, walk.states.graph.nodes[task.node].name, task)

    def _failed(
        self, walk: Walk[Waiter], task: Task, status: int, flags: int, offset: int, length: int
    ) -> list[Action]:
        """An attempt is answered with an error, whose text lies at `offset`."""
        text = str(self._client.segment.buffer[offset : offset + length], "utf-8", "replace")
        if status == BadRequest.http_status and not read_times(self._client.segment, task.slot).started_ns:
            # The handler has not seen it; its own errors with this status are a node's errors like others.
            task.error = BadRequest(text)
            return walk.states.unreadable(task)
        # A full queue, or a worker that has gone: the batcher says no more.
        is_refused = bool(flags & ResponseFlag.REFUSED)
        task.error = self.attempts.no_worker(walk, task) if is_refused else None
        may_retry = not is_refused and self._client.may_use(task.slot)
        if not is_refused and walk.states.graph.nodes[task.node].on_error == TELL:
            task.error = handler_error(status, text)
            may_retry = may_retry and status >= InternalServerError.http_status  # else it is the client's mistake
        return self._attempt_failed(walk, task, text, may_retry=may_retry)

    def _attempt_failed(self, walk: Walk[Waiter], task: Task, text: str, *, may_retry: bool) -> list[Action]:
        """An attempt has come to nothing; the log has TorchServe's lines, whose attempts are counted from 0."""
        is_news = task.state == State.RUNNING and not walk.states.is_over
        name, attempt = walk.states.graph.nodes[task.node].name, task.attempt - 1
        if task.state == State.RUNNING:
            task.limit_ns = 0  # the next attempt has its own time; one that waits for this one's end has it already
        actions = walk.states.failed(task, may_retry=may_retry)
        if is_news and task.state == State.RUNNING:
            log.error(_AGAIN, name, attempt)
            task.error = None
        elif is_news and text:
            log.error("%s : %s", name, text[:_MOST_LOGGED])
        return actions

    def _answered(self, walk: Walk[Waiter], task: Task, offset: int, length: int) -> list[Action]:
        node = walk.states.graph.nodes[task.node]
        if task.is_gate:
            passed = bytes(self._client.segment.buffer[offset : offset + length]) not in _FALSE
            task.limit_ns = 0
            return walk.states.answered(task, passed=passed)
        if not node.scatters:
            return walk.states.answered(task)
        try:
            if node.is_function:
                task.parts = packed_parts(self._client.segment.buffer, offset, length)
            else:
                task.parts = json_parts(bytes(self._client.segment.buffer[offset : offset + length]))
        except ValueError as error:
            return self._attempt_failed(walk, task, f"The answer cannot be scattered: {error}", may_retry=True)
        return walk.states.answered(task, items=len(task.parts))

    def _take_chunks(self, task: Task) -> None:
        """Takes what has come of an inner node's stream, of which only the first chunk counts."""
        self._client.answer(task.slot)  # from now on only more chunks are news
        chunks = self._client.read_stream(task.slot)
        if chunks and task.value is None:
            task.value = chunks[0]

    def _pass_on(self, walk: Walk[Waiter], task: Task) -> tuple[int, Waiter]:
        """Leaves the stream of the last node to who waits for it."""
        task.took_ns = time.monotonic_ns() - task.began_ns
        self._carry_out(walk, walk.states.passed_on(task))
        return self._land(walk, task)

    def _finish(self, walk: Walk[Waiter], ends: list[Task], *, in_slot: bool) -> tuple[int, Waiter] | None:
        """Answers with what the last tasks have."""
        if walk.handle not in self._by_handle:  # the client has gone while it was told of the last node
            self._let_go(ends)
            return None
        graph = walk.states.graph
        if len(ends) == 1 and len(graph.ends) == 1:
            (end,) = ends
            if in_slot and not end.refs and end.slot >= 0 and end.state == State.DONE and end.value is None:
                return self._land(walk, end)
            answer = Answer()
            answer.body = self._body_of(walk, end)
        else:
            answer = joined({graph.nodes[end.node].name: self._body_of(walk, end) for end in ends})
            if len(answer.body) > self._most_answer_bytes:
                answer = Answer(InternalServerError("Response is larger than max_response_size"))
        if answer.error is None:
            answer.headers = [JSON_TYPE, ("server-timing", walk.timings(walk.took_ns()))]
        self._let_go(ends)
        self._deliver(walk, answer)
        return None

    def _let_go(self, ends: list[Task]) -> None:
        for end in ends:
            end.is_kept = False
            if not end.refs and not end.is_open:
                self.attempts.release(end)

    def _land(self, walk: Walk[Waiter], end: Task) -> tuple[int, Waiter]:
        """Makes a task's slot the one that the request is answered from."""
        slot = self.attempts.take_slot(end)
        took_ns = walk.took_ns()
        self._ended[slot] = walk, walk.timings(took_ns)
        self._waiting[slot] = walk.waiter
        self._count(walk, _OK, took_ns)
        self._forget(walk)
        return slot, walk.waiter

    def _body_of(self, walk: Walk[Waiter], end: Task) -> bytes:
        inline = inline_answer(walk.states.graph, end)
        if inline is not None:
            return inline
        offset, length = end.place
        return bytes(self._client.segment.buffer[offset : offset + length])

    def _deliver(self, walk: Walk[Waiter], answer: Answer) -> None:
        if self._forget(walk):
            self._count(walk, _OK if answer.error is None else answer.error.status)
            answer.walk = walk
            self.deliver(walk.waiter, answer)

    def _forget(self, walk: Walk[Waiter]) -> bool:
        """Takes a walk's handle back; False where that was done before."""
        self._waiting.pop(walk.handle, None)
        return self._by_handle.pop(walk.handle, None) is not None

    def _count(self, walk: Walk[Waiter], code: int, took_ns: list[int] | None = None) -> None:
        took_us = (time.monotonic_ns() - walk.began_ns) // 1000
        nodes_us = [each // 1000 for each in took_ns or walk.took_ns()]
        self._counters.ended(walk.states.graph.index, code, took_us, nodes_us)
