"""Predictions for an event loop: requests are submitted on it, and their answers handed to whoever awaits them.

All of it runs on the loop's thread but for the one that hears the segment's doorbell. What can be done once per turn of
the loop is: publishing to the batchers, and the scan for answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from wsgi_ts.batcher.shm.layout import CLIENT_GONE, REQUEST_INLINE_BYTES, TOO_LATE, SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, Request
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.call_traces import CURRENT, CallTrace, Metadata
from wsgi_ts.dataplane.exchange import Exchange, no_memory
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.routes import RoutingTable, Target
from wsgi_ts.errors import InternalServerError, PayloadTooLarge, RequestTimeout, ServerError
from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: What an answer may have waiting for its client before the client counts as gone.
MAX_UNSENT = 16 * 1024 * 1024
#: What all answers may have waiting for their clients together; the one with most of it ends then.
MAX_UNSENT_OF_ALL = 128 * 1024 * 1024
#: What a client learns of a call that a defect of the server has ended.
_UNEXPECTED = "Internal server error; the server's log names this request by its id."


class Call:
    """One request under way. Take its answer from `parts`, and `close` it in any case.

    Attributes:
        slot: where it lies; -1 once that is given back, or left to `AsyncPlane`.
        target: where it goes.
        request_id: its id.
        timer: ends it when its time is over; None for no limit.
        status, headers: of the answer, once it has begun.
        is_streamed: whether the beginning of a streamed answer has come.
        trace: what is told of it; None where nobody asks.
    """

    __slots__ = (
        *("_ended", "_error", "_news", "_parts", "_plane", "_unsent"),
        *("headers", "is_streamed", "request_id", "slot", "status", "target", "timer", "trace"),
    )

    def __init__(
        self, plane: AsyncPlane, slot: int, target: Target, request_id: str, trace: CallTrace | None = None
    ) -> None:
        self.slot = slot
        self.trace = trace
        self.target = target
        self.request_id = request_id
        self.timer: asyncio.TimerHandle | None = None
        self.is_streamed = False
        self.status = 200
        self.headers: list[tuple[str, str]] = []
        self._plane = plane
        self._parts: deque[bytes] = deque()
        self._unsent = 0
        self._ended = False
        self._error: ServerError | None = None
        self._news: asyncio.Future[None] | None = None

    async def begin(self) -> None:
        """Waits for the beginning of the answer: `status`, `headers` and `is_streamed` are right then.

        Raises:
            ServerError: there is no answer.
        """
        while not (self._parts or self.is_streamed or self.is_over):
            await self._next()
        if self._error is not None and not self._parts:
            raise self._error

    async def parts(self) -> AsyncIterator[bytes]:
        """The answer: one part, or as many as its handler sends, each as soon as it is there.

        Raises:
            ServerError: there is no answer, or no more of it.
        """
        while True:
            while self._parts:
                part = self._parts.popleft()
                if self._unsent:
                    self._hold(-len(part))
                yield part
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            await self._next()

    async def whole(self) -> bytes:
        """Returns all parts of the answer in one.

        Raises:
            ServerError: there is no answer, or it is larger than `max_response_size`.
        """
        parts = []
        length = 0
        limit = self._plane.most_response_bytes
        async for part in self.parts():
            parts.append(part)
            length += len(part)
            if length > limit:
                raise PayloadTooLarge(f"The parts of the answer have more than {limit} bytes (max_response_size)")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Nobody waits for it any more: what has not begun is never run, and its slot is given back."""
        self._plane.forget(self)
        self._plane.unsent.note(self, 0)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._ended or self._error is not None

    def answer(self, part: bytes) -> None:
        """Adds the one part of an answer that is not streamed; it does not count as unsent."""
        self._parts.append(part)

    def add(self, parts: Sequence[bytes]) -> bool:
        """Adds what has come of a stream; False when the client takes too little of it."""
        self._parts.extend(parts)
        self._hold(sum(map(len, parts)))
        self._wake()
        return self._unsent <= MAX_UNSENT

    def _hold(self, more: int) -> None:
        self._unsent += more
        self._plane.unsent.note(self, self._unsent)

    def drop(self) -> None:
        """Forgets what the client has not taken."""
        self._parts.clear()
        self._hold(-self._unsent)

    def end(self, error: ServerError | None = None) -> None:
        """Ends the call, with an error if it has failed."""
        self._ended = error is None
        self._error = error
        self._wake()
        if self.trace is not None:
            self.trace.end(self.request_id, error)

    async def _next(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class AsyncPlane:
    """The calls of one process. Make it on the loop's thread.

    Args:
        instance: the instance.
        loop: the event loop.

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

    def submit(
        self, target: Target, head: bytes, parts: Sequence[bytes], content_type: bytes = b"", metadata: Metadata = ()
    ) -> Call:
        """Submits a request.

        Args:
            target: where it goes.
            head: what the handler sees of headers: a request line, header lines, an empty line.
            parts: the body, in parts.
            content_type: of the body, empty for none.
            metadata: what the client has sent besides.

        Raises:
            ServerError: it is refused: what `target.error` says, no free slot, too large, no memory.
        """
        traces = self._exchange.traces
        if traces is None:
            return self._submit(target, head, parts, content_type, None)
        trace = CallTrace(traces, target, head, metadata)
        CURRENT.set(trace)
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
            raise PayloadTooLarge(f"The request has {length} bytes, max_request_size is {self._limit}")
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
        request = Request(target, call.request_id, head, content_type, body, length, now_ns)
        if trace is not None:
            trace.submitted_ns = now_ns
            request = request._replace(flags=trace.flags)
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
