"""Predictions of one process, whatever the transport: submitted into slots of its own segment, answered from there.

The web worker's loop, the gRPC server (`async_plane`) and servers with a thread per request (`blocking`) differ in who
waits for an answer, and how. All else is here: which slot and which batcher a request gets, what has become of it, and
what is done with an answer that nobody waits for any more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Generic, TypeVar

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import LONGEST_WAIT_S
from wsgi_ts.batcher.shm.layout import ModelWord, RequestFlag, SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, Request
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull, free_bytes
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.dataplane.attempts import Attempts
from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.dataplane.request_traces import RequestTraces
from wsgi_ts.dataplane.retry_after import RetryAfter
from wsgi_ts.dataplane.routes import RoutingTable, Target
from wsgi_ts.dataplane.walk_counters import WalkCounters
from wsgi_ts.dataplane.walks import Walks
from wsgi_ts.errors import (
    OutOfResources,
    ServerError,
    ServiceUnavailable,
    handler_error,
)
from wsgi_ts.instance.instance import Instance
from wsgi_ts.instance.shared_memory import segment_layout
from wsgi_ts.settings.config import Config
from wsgi_ts.tracing.options import TraceOptions

log = logging.getLogger(__name__)

_MOST_WARM_BYTES = 256 * 1024 * 1024
#: Who waits for an answer.
Waiter = TypeVar("Waiter")


class RequestIds:
    """UUIDs for requests, made by counting: version-4 form, 74 random bits for the process, 48 counted ones."""

    def __init__(self) -> None:
        self._prefix = str(uuid.uuid4())[:24]
        self._next = int.from_bytes(os.urandom(5), "big")

    def new(self) -> str:
        """Returns a request id that no other process or request has."""
        self._next += 1
        return f"{self._prefix}{self._next & 0xFFFFFFFFFFFF:012x}"


class Exchange(Generic[Waiter]):
    """The requests that one process has under way, and what it needs to submit them.

    It belongs to one thread; where several use it, they hold a lock around each call. An instance has one segment for
    each of these, which the supervisor removes when the process has ended.

    Attributes:
        config: the configuration.
        board: the instance's board; `web_row` and `http_row` are the places of this process's counters on it.
        routes: what the supervisor has published; `refresh` it before it is asked.
        ids: where ids of requests come from.
        client: the slots.
        bell: rung for answers.
        waiting: of each submitted slot who waits for its answer; None where nobody does any more, and of the slots of a
            workflow's nodes: who waits for a workflow stands here under its handle.
        walks: the workflows' requests.
        traces: begins traces and makes records of requests; None where there is nothing to keep and to export.

    Raises:
        SharedMemoryFull: there is no room for a segment.
    """

    def __init__(self, instance: Instance) -> None:
        config = self.config = instance.config
        self.board = Board.attach(instance.prefix)
        self.routes = RoutingTable(instance.run_dir, self.board, workflow_names=config.workflow_names)
        self.ids = RequestIds()
        control = ControlPlane(instance.run_dir)
        try:
            reply = control.call("new_segment", pid=os.getpid())
            index, batchers = reply["index"], reply["batchers"]
            segment = Segment.create(instance.prefix, index, segment_layout(config, batchers))
        except BaseException:
            # The process may go on without, and try again.
            control.close()
            self.board.close()
            raise
        self.bell = segment.bell(instance.prefix)
        self.client = SlotClient(segment, self.board, batchers, warm_bytes(config))
        self.web_row = self.board.web_row(index)
        self.http_row = self.board.http_row(index)
        self._refusals = self.board.refusals(index)
        self.waiting: dict[int, Waiter | None] = {}
        self._chosen = 0
        self._is_due = False
        self._retry_after = RetryAfter(self.board)
        routes, counters = self.routes, WalkCounters(self.board, index)
        self._walk_counters = counters
        attempts: Attempts[Waiter] = Attempts(
            self.client, routes.node_target, self.waiting, self._batcher_of, counters, self._retry_after
        )
        self.walks = Walks(attempts, config.max_response_size)
        options = TraceOptions.of(config, instance.run_dir)
        self.traces = RequestTraces(options, self.routes.default_version, segment) if options.is_on else None
        self.walks.has_traces = options.is_on
        names = config.ts_header_key_sequence_id, config.ts_header_key_sequence_start
        self._sequence_headers = names[0].encode("latin-1"), names[1].encode("latin-1")
        control.call("segment_ready", index=index)
        control.close()
        self.routes.refresh()

    def listen(self, wake: Callable[[], None], *, always: bool) -> None:
        """Starts a thread that calls `wake` after each ring of the doorbell, and once a second.

        `wake` must neither block nor raise. With `always` rings are asked for for good; else there are some only while
        this process waits (`Doorbell.wait`).
        """
        if always:
            self.bell.fall_asleep()

        def pass_on() -> None:
            looked_at = time.monotonic()
            while True:
                self.bell.sleep(LONGEST_WAIT_S)
                now = time.monotonic()
                if now - looked_at >= LONGEST_WAIT_S:
                    self._is_due, looked_at = True, now
                wake()

        threading.Thread(target=pass_on, name="doorbell", daemon=True).start()

    def take(self, target: Target) -> int:
        """Returns a slot for a request.

        Raises:
            ServiceUnavailable: all are in use, or too many of them by this model.
        """
        slot = self.client.take(target.model)
        if slot is None:
            self._count_refusal(target)
            self._count_workflow(target, ServiceUnavailable.http_status)
            raise self._later(ServiceUnavailable.no_slot(target.model_name, target.version), target)
        return slot

    def refuse(self, target: Target, error: ServerError) -> ServerError:
        """Counts a request that is refused before it has a slot, and returns the error that says why."""
        self._count_workflow(target, error.status)
        if error.status == ServiceUnavailable.http_status:
            self._count_refusal(target)
        return error

    def _count_refusal(self, target: Target) -> None:
        if target.model >= 0:
            self.board.words[self._refusals + target.model] += 1
        row = target.flags >> RequestFlag.ROW_SHIFT
        if row:
            self.board.words[self._refusals + row - 1] += 1

    def _count_workflow(self, target: Target, status: int) -> None:
        """Counts what a client of a workflow gets without a walk."""
        if target.graph is not None:
            self._walk_counters.refused(target.graph.index, status)

    def submit(self, slot: int, waiter: Waiter, target: Target, request: Request) -> int:
        """Submits a request; the batcher sees it after `client.publish`.

        The slot is from `take`.

        Returns:
            The number under which the request is known until there is news of it: the slot, or a workflow's handle.

        Raises:
            OutOfResources: /dev/shm is full; the slot is given back.
        """
        if target.is_special:
            if target.graph is not None:
                return self._begin_walk(slot, waiter, target, target.graph, request)
            request.sequence, request.head = self._sequence_of(request.head)
        batchers = target.batchers
        batcher = batchers[0] if len(batchers) == 1 else self._choose(target, request.sequence)
        try:
            self.client.submit(slot, batcher, request)
        except SharedMemoryFull as full:
            self.client.abandon(slot)
            self._count_refusal(target)
            raise no_memory(full) from full
        self.waiting[slot] = waiter
        return slot

    def _begin_walk(self, slot: int, waiter: Waiter, target: Target, graph: Graph, request: Request) -> int:
        try:
            return self.walks.begin(slot, waiter, target, graph, request)
        except SharedMemoryFull as full:
            self.client.abandon(slot)
            self._count_workflow(target, OutOfResources.http_status)
            raise no_memory(full) from full

    def news(self) -> Iterator[tuple[int, Waiter]]:
        """Yields the slots of which there is news, and who waits for that; gives back those that nobody waits for."""
        client, waiting, walks = self.client, self.waiting, self.walks
        if self._is_due:
            self._is_due = False
            client.look_over()
        for slot in client.answered():
            waiter = waiting.get(slot)
            if waiter is not None:
                yield slot, waiter
            elif slot in walks.attempts.steps:
                landed = walks.take_news(slot)
                if landed is not None:
                    yield landed
            elif client.state(slot) == SlotState.STREAMING:
                client.read_stream(slot)  # its model worker must not wait for room
            else:
                self.finish(slot)

    def answer(self, slot: int, target: Target) -> Answer:
        """Reads the answer in a slot of which there is news; of one that is streamed its beginning."""
        answer = self.client.answer(slot)
        if answer.error is not None:
            answer.error = self._error_of(answer.error, target)
        elif target.graph is not None:
            return self.walks.answer(slot, answer)
        return answer

    def chunks(self, slot: int) -> tuple[list[bytes], int]:
        """Takes what has come of a streamed answer.

        Returns:
            The chunks that are not empty, and the slot's state from before they were taken: after any other than
            STREAMING nothing more comes.
        """
        state = self.client.state(slot)
        return [chunk for chunk in self.client.read_stream(slot) if chunk], state

    def finish(self, slot: int) -> None:
        """Gives a slot back whose answer was taken."""
        self.waiting.pop(slot, None)
        self.client.release(slot)

    def keep_for_sending(self, slot: int) -> None:
        """Keeps a slot whose answer is being sent from it; there is no more news of it, until it is released."""
        del self.waiting[slot]
        self.client.keep_for_sending(slot)

    def forget(self, slot: int) -> None:
        """Abandons a request: what has not begun never runs, and its slot is given back at its end."""
        if slot >= self.client.capacity:
            self.walks.leave(slot)
            return
        self.waiting[slot] = None
        self.client.cancel(slot)

    def client_left(self, slot: int, target: Target, request_id: str) -> None:
        """Forgets a request whose client has gone before it had its answer."""
        self.forget(slot)
        if target.is_continuous:
            log.info("Connection to client got closed; Removing job: %s", request_id)

    def _error_of(self, error: ServerError, target: Target) -> ServerError:
        """Returns what an error in a slot means for a request to this model."""
        if isinstance(error, ServiceUnavailable):
            return self._later(ServiceUnavailable.no_worker(target.model_name, target.version), target)
        return handler_error(error.status, error.message)

    def _later(self, error: ServiceUnavailable, target: Target) -> ServiceUnavailable:
        """Says in a refusal when the client may come again."""
        error.retry_after_s = self._retry_after.seconds(target, time.monotonic_ns())
        return error

    def _sequence_of(self, head: bytes) -> tuple[bytes, bytes]:
        """Returns the id of the sequence that a request belongs to, and its head; without an id it begins one."""
        id_name, start_name = self._sequence_headers
        key = header_value(head, id_name)
        if not key:
            key = f"ts-seq-{uuid.uuid4()}".encode()
            head = b"%b%b: %b\r\n\r\n" % (head[:-2], id_name, key)
            if not header_value(head, start_name):
                head = b"%b%b: true\r\n\r\n" % (head[:-2], start_name)
        return key, head

    def _batcher_of(self, target: Target, sequence: bytes = b"") -> int:
        batchers = target.batchers
        return batchers[0] if len(batchers) == 1 else self._choose(target, sequence)

    def _choose(self, target: Target, sequence: bytes) -> int:
        """Returns the batcher with the fewest outstanding requests per ready worker.

        All requests of a sequence go to the same one, as long as it has workers.
        """
        batchers = target.batchers
        if sequence:  # by rendezvous hashing: another one that comes or goes moves only the sequences it gets or had
            return max(batchers, key=lambda batcher: blake2b(sequence, digest_size=8, salt=b"%d" % batcher).digest())
        words = self.board.words
        self._chosen += 1
        best, best_load = -1, float("inf")
        for offset in range(len(batchers)):  # starts with another one each time, so that equals take turns
            batcher = batchers[(self._chosen + offset) % len(batchers)]
            row = self.board.model_row(batcher, target.model)
            outstanding = words[row + ModelWord.OUTSTANDING] + self.client.unpublished(batcher)
            load = (outstanding + 1) / max(words[row + ModelWord.READY_WORKERS], 1e-3)
            if load < best_load:
                best, best_load = batcher, load
        return best


def no_memory(full: SharedMemoryFull) -> OutOfResources:
    """Logs that shared memory is full, and returns the error for the client."""
    log.error("%s", full.strerror)
    return OutOfResources("Not enough shared memory for the request")


def header_value(head: bytes, name: bytes) -> bytes:
    """Returns the value of a header, found by its name in any case; b"" where there is none."""
    wanted = name.lower()
    for line in head.split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.lower() == wanted:
            return value.strip(b" \t")
    return b""


def warm_bytes(config: Config) -> int:
    """Returns how much reserved memory the free slots of one web worker may keep for the next large body."""
    if config.shm_warm_bytes:
        return config.shm_warm_bytes // max(1, config.web_workers)
    return min(_MOST_WARM_BYTES, free_bytes() // 8)
