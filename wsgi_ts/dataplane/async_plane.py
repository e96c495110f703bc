"""Predictions for an event loop: requests are submitted on it, and their answers handed to whoever awaits them.

All of it runs on the loop's thread but for the one that hears the segment's doorbell. What can be done once per turn of
the loop is: publishing to the batchers, and the scan for answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Final

from wsgi_ts.batcher.shm.layout import CLIENT_GONE, REQUEST_INLINE_BYTES, TOO_LATE, SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, Request
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.async_call import MAX_UNSENT, Call
from wsgi_ts.dataplane.call_traces import CallTrace, Metadata
from wsgi_ts.dataplane.exchange import Exchange, no_memory
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.routes import RoutingTable, Target
from wsgi_ts.errors import InternalServerError, PayloadTooLarge, RequestTimeout, ServerError
from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: What all answers may have waiting for their clients together; the one with most of it ends then.
MAX_UNSENT_OF_ALL: Final = 128 * 1024 * 1024
#: What a client learns of a call that a defect of the server has ended.
_UNEXPECTED: Final = "Internal server error; the server's log names this request by its id."


class AsyncPlane:
    """The calls of one process. Make it on the loop's thread.

    Attributes:
        board: the instance's board.
        unsent: what the calls have waiting for their clients.
        most_response_bytes: of an answer to a call that takes only one.
    """

    def __init__(self, instance: Instance, loop: asyncio.AbstractEventLoop) -> None:
        exchange = self._exchange = Exchange[Call](instance)
        self._loop = loop
        self._limit = instance.config.max_request_size
        self.board = exchange.board
        self.most_response_bytes = instance.config.max_response_size
        self.unsent: Ledger[Call] = Ledger(MAX_UNSENT_OF_ALL)
        self._must_publish = False
        self._is_woken = False
        exchange.walks.deliver = self._deliver
        exchange.walks.attempts.limit = self._look_at
        exchange.listen(self._wake, always=True)

    @property
    def routes(self) -> RoutingTable:
        """What the supervisor has published last."""
        self._exchange.routes.refresh()
        return self._exchange.routes

    def begin_trace(self, target: Target, head: bytes, metadata: Metadata) -> CallTrace | None:
        """Begins to note what is told of a request; None where nobody asks. `submit` takes it."""
        traces = self._exchange.traces
        return None if traces is None else CallTrace(traces, target, head, metadata)

    def submit(
        self,
        target: Target,
        head: bytes,
        parts: Sequence[bytes],
        content_type: bytes = b"",
        trace: CallTrace | None = None,
    ) -> Call:
        """Submits a request.

        `head` is what the handler sees of headers: a request line, header lines, an empty line; `trace` is what
        `begin_trace` has returned.

        Raises:
            ServerError: it is refused: what `target.error` says, no free slot, too large, no memory.
        """
        if trace is None:
            return self._submit(target, head, parts, content_type, None)
        try:
            return self._submit(target, trace.head, parts, content_type, trace)
        except ServerError as error:
            trace.end(self._exchange.ids.new(), error)
            raise

    def _submit(
        self, target: Target, head: bytes, parts: Sequence[bytes], content_type: bytes, trace: CallTrace | None
    ) -> Call:
        if target.error is not None:
            raise self._exchange.refuse(target, target.error)
        length = sum(map(len, parts))
        if length > self._limit:
            error = PayloadTooLarge(f"The request has {length} bytes, max_request_size is {self._limit}")
            raise self._exchange.refuse(target, error)
        exchange = self._exchange
        slot = exchange.take(target)
        call = Call(self, slot, target, exchange.ids.new(), trace)
        # A small body is joined first; a large one is written where it belongs, part by part.
        body = None
        if length > REQUEST_INLINE_BYTES:
            self._write(slot, parts, length)
        else:
            body = b"".join(parts)
        now_ns = time.monotonic_ns()
        flags = 0
        if trace is not None:
            trace.submitted_ns = now_ns
            flags = trace.flags
        request = Request(target, call.request_id, head, content_type, body, length, now_ns, flags=flags)
        call.slot = exchange.submit(slot, call, target, request)
        if target.graph is not None:
            self._look_at(call, exchange.walks.limit_of(call.slot))
        elif target.client_timeout_ms:
            call.timer = self._loop.call_later(target.client_timeout_ms / 1000, self._too_late, call)
        if not self._must_publish:
            self._must_publish = True
            self._loop.call_soon(self._publish)
        return call

    def give_up(self, error: ServerError) -> None:
        """Ends all calls with an error: the server has ended, and nobody answers them any more."""
        calls = [call for call in self._exchange.waiting.values() if call is not None]
        self._exchange.waiting.clear()
        for call in calls:
            call.slot = -1
            if call.timer is not None:
                call.timer.cancel()
            call.end(error)

    @property
    def under_way(self) -> int:
        """How many calls wait for an answer, or the end of one."""
        return sum(call is not None for call in self._exchange.waiting.values())

    def forget(self, call: Call) -> None:
        """See `Call.close`."""
        if call.timer is not None:
            call.timer.cancel()
        if call.slot < 0:
            return
        if call.is_over:
            self._exchange.forget(call.slot)
        else:
            if call.trace is not None:
                call.trace.end(call.request_id, ServerError(CLIENT_GONE, status=499))
            self._exchange.client_left(call.slot, call.target, call.request_id)
        call.slot = -1

    def _write(self, slot: int, parts: Sequence[bytes], length: int) -> None:
        client = self._exchange.client
        try:
            room = client.body_room(slot, length)
        except SharedMemoryFull as full:
            client.abandon(slot)
            raise no_memory(full) from full
        start = 0
        for part in parts:
            end = start + len(part)
            room[start:end] = part
            start = end

    def _publish(self) -> None:
        self._must_publish = False
        self._exchange.client.publish()

    def _look_at(self, call: Call, limit_ns: int) -> None:
        """Schedules the next look at a workflow's limits."""
        if call.timer is not None:
            call.timer.cancel()
        delay_s = max(0.0, (limit_ns - time.monotonic_ns()) / 1e9)
        call.timer = self._loop.call_later(delay_s, self._look, call)

    def _look(self, call: Call) -> None:
        limit_ns = self._exchange.walks.look(call.slot)
        if limit_ns:
            self._look_at(call, limit_ns)

    def _deliver(self, call: Call, answer: Answer) -> None:
        """Answers a workflow's request whose answer lies in no slot."""
        call.slot = -1
        if call.timer is not None:
            call.timer.cancel()
        if call.trace is not None:
            call.trace.walk = answer.walk
        call.status, call.headers = answer.status, answer.headers
        if answer.error is None:
            call.answer(bytes(answer.body))
        call.end(answer.error)

    def _too_late(self, call: Call) -> None:
        call.end(RequestTimeout(TOO_LATE))
        self.forget(call)

    def _wake(self) -> None:
        """Has the loop look for answers; called on the thread that hears the doorbell."""
        if self._exchange.client.in_flight and not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        """Takes what has come for the calls; a failure ends one call only."""
        self._is_woken = False  # first: what is answered from now on wakes the loop again
        for slot, call in self._exchange.news():
            try:
                self._take_answer(call, slot)
            except Exception:
                log.exception("Unexpected error in request %s", call.request_id)
                self.forget(call)
                call.end(InternalServerError(_UNEXPECTED))
        self._exchange.client.publish()  # the next nodes of workflows

    def _take_answer(self, call: Call, slot: int) -> None:
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        if not call.is_streamed:
            answer = self._exchange.answer(slot, call.target)
            if call.trace is not None:
                call.trace.slot, call.trace.walk = slot, answer.walk
            call.status, call.headers = answer.status, answer.headers
            if answer.stream is None:
                if answer.error is None:
                    call.answer(bytes(answer.body))
                self._finish(call, slot)
                call.end(answer.error)
                return
            call.slot = slot
            call.is_streamed = True
        self._take_parts(call, slot)

    def _take_parts(self, call: Call, slot: int) -> None:
        """Takes what lies in a stream's ring: the model worker never waits for a slow client."""
        chunks, state = self._exchange.chunks(slot)
        keeps_up = call.add(chunks)
        if state != SlotState.STREAMING:
            self._finish(call, slot)
            call.end(InternalServerError("Prediction failed") if state == SlotState.FAILED else None)
        elif not keeps_up:
            self._cut_off(call, f"More than {MAX_UNSENT} bytes of the answer wait for the client")
        while self.unsent.is_exceeded:
            slowest = self.unsent.largest()
            self._cut_off(slowest, "Too many bytes of answers wait for their clients, most of them for this one")

    def _cut_off(self, call: Call, reason: str) -> None:
        """Ends the answer of a client that takes too little of it, and drops what it has not taken."""
        call.drop()
        call.end(PayloadTooLarge(reason))
        self.forget(call)

    def _finish(self, call: Call, slot: int) -> None:
        call.slot = -1
        self._exchange.finish(slot)
