"""The data plane for an event loop: submits requests to slots and hands their answers to whoever awaits them.

All of it runs on the loop's thread but for `_listen_to_bell`, a tiny thread that waits on the segment's doorbell and
wakes the loop. What can be done once per turn of the loop is: publishing to the batchers, and the scan for answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import SlotState
from wsgi_ts.batcher.shm.shared_memory import SharedMemoryFull
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.plane import DataPlane, RoutingTable, Target, ticket_of
from wsgi_ts.errors import InternalServerError, OutOfResources, PayloadTooLarge, RequestTimeout, ServiceUnavailable

log = logging.getLogger(__name__)

#: What an answer may have waiting for its client before the client counts as gone.
MAX_UNSENT = 16 * 1024 * 1024
#: What all answers may have waiting for their clients together; the one with most of it ends then.
MAX_UNSENT_OF_ALL = 128 * 1024 * 1024
#: What a client learns of a call that a defect of the server has ended.
_UNEXPECTED = "Internal server error; the server's log names this request by its id."
#: A body above this is written where it belongs, part by part; a smaller one is joined first.
_DIRECT_BODY_BYTES = layout.REQUEST_INLINE_BYTES
_BELL_WAIT_S = 1.0


class Call:
    """One request under way. Take its answer from `parts`, and `close` it in any case.

    Attributes:
        slot: where it lies; -1 once that is given back, or left to `AsyncPlane`.
        target: where it goes.
        request_id: its id.
    """

    __slots__ = ("_ended", "_error", "_news", "_parts", "_plane", "_unsent", "request_id", "slot", "target", "timer")

    def __init__(self, plane: AsyncPlane, slot: int, target: Target, request_id: str) -> None:
        self.slot = slot
        self.target = target
        self.request_id = request_id
        self.timer: asyncio.TimerHandle | None = None
        self._plane = plane
        self._parts: deque[bytes] = deque()
        self._unsent = 0
        self._ended = False
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None

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
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    async def whole(self) -> bytes:
        """All parts of the answer in one.

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
        """Nobody waits for it any more: what has not begun is never run, and its place is freed."""
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

    def end(self, error: Exception | None = None) -> None:
        """Says that nothing more comes, and why if that is not as it should be."""
        self._ended = error is None
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class AsyncPlane:
    """The calls of one process. Make it on the loop's thread.

    Args:
        plane: board, routes and segment.
        loop: the event loop.

    Attributes:
        unsent: what the calls have waiting for their clients.
        most_response_bytes: of an answer to a call that takes only one.
    """

    def __init__(self, plane: DataPlane, loop: asyncio.AbstractEventLoop) -> None:
        self._plane = plane
        self._client = plane.client
        self._loop = loop
        self._limit = plane.config.max_request_size
        self.most_response_bytes = plane.config.max_response_size
        self.unsent: Ledger[Call] = Ledger(MAX_UNSENT_OF_ALL)
        #: Who waits for a slot; None where nobody does any more, so that `_collect` gives it back.
        self._waiting: dict[int, Call | None] = {}
        self._streams: set[int] = set()
        self._must_publish = False
        self._is_woken = False
        threading.Thread(target=self._listen_to_bell, name="doorbell", daemon=True).start()

    @property
    def routes(self) -> RoutingTable:
        """What the supervisor has published last."""
        self._plane.routes.refresh()
        return self._plane.routes

    def submit(self, target: Target, head: bytes, parts: Sequence[bytes], content_type: bytes = b"") -> Call:
        """Submits a request.

        Args:
            target: where it goes.
            head: what the handler sees of headers: a request line, header lines, an empty line.
            parts: the body, in parts.
            content_type: of the body, empty for none.

        Raises:
            ServerError: it is refused: what `target.error` says, no free slot, too large, no memory.
        """
        if target.error is not None:
            raise target.error
        length = sum(map(len, parts))
        if length > self._limit:
            raise PayloadTooLarge(f"The request has {length} bytes, max_request_size is {self._limit}")
        client, plane = self._client, self._plane
        sequence = b""
        if target.has_sequences:
            sequence, head = plane.sequence_of(head)
        slot = client.take(target.model)
        if slot is None:
            raise ServiceUnavailable.no_slot(target.model_name, target.version)
        request_id = plane.ids.new()
        try:
            body = None
            if length > _DIRECT_BODY_BYTES:
                self._write(slot, parts, length)
            else:
                body = b"".join(parts)
            client.submit(
                slot,
                target.model,
                plane.choose(target, sequence),
                request_id.encode(),
                head,
                target.url_path,
                content_type,
                body,
                length,
                target.flags,
                time.monotonic_ns(),
                layout.NOT_RETURNING,
                sequence,
            )
        except SharedMemoryFull as full:
            client.abandon(slot)
            log.error("%s", full.strerror)
            raise OutOfResources("Not enough shared memory for the request") from full
        call = self._waiting[slot] = Call(self, slot, target, request_id)
        if target.client_timeout_ms:
            call.timer = self._loop.call_later(target.client_timeout_ms / 1000, self._too_late, call)
        if not self._must_publish:
            self._must_publish = True
            self._loop.call_soon(self._publish)
        return call

    def forget(self, call: Call) -> None:
        """See `Call.close`."""
        if call.timer is not None:
            call.timer.cancel()
        if call.slot < 0:
            return
        self._waiting[call.slot] = None
        self._client.cancel(call.slot)
        call.slot = -1
        if call.target.is_continuous and not call.is_over:
            log.info("Connection to client got closed; Removing job: %s", call.request_id)

    def _write(self, slot: int, parts: Sequence[bytes], length: int) -> None:
        room = self._client.body_room(slot, length)
        start = 0
        for part in parts:
            end = start + len(part)
            room[start:end] = part
            start = end

    def _publish(self) -> None:
        self._must_publish = False
        self._client.publish()

    def _too_late(self, call: Call) -> None:
        call.end(RequestTimeout(layout.TOO_LATE))
        self.forget(call)

    def _listen_to_bell(self) -> None:
        bell = self._plane.bell
        bell.fall_asleep()  # for good: the thread always sleeps, and the loop is woken in no other way
        while True:
            bell.sleep(_BELL_WAIT_S)
            if self._client.in_flight and not self._is_woken:
                self._is_woken = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                    self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        """Looks after all slots that have an answer or a part of one."""
        self._is_woken = False  # first: what is answered from now on wakes the loop again
        client = self._client
        for slot in client.answered():
            call = self._waiting.get(slot)
            if call is not None:
                self._attend(call, slot)
            elif client.state(slot) == SlotState.STREAMING:
                client.read_stream(slot)
            else:
                self._release(slot)

    def _attend(self, call: Call, slot: int) -> None:
        """Takes what has come for a call; whatever goes wrong costs this call and no other."""
        try:
            self._take_answer(call, slot)
        except Exception:
            log.exception("Unexpected error in request %s", call.request_id)
            self.forget(call)
            call.end(InternalServerError(_UNEXPECTED))

    def _take_answer(self, call: Call, slot: int) -> None:
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        if slot not in self._streams:
            answer = self._client.answer(slot)
            if not answer.streamed:
                ticket = ticket_of(answer, call.target)
                if ticket.error is None:
                    call.answer(bytes(ticket.body))
                call.slot = -1
                self._release(slot)
                call.end(ticket.error)
                return
            self._streams.add(slot)
        self._take_parts(call, slot)

    def _take_parts(self, call: Call, slot: int) -> None:
        """Takes what lies in a stream's ring: the model worker never waits for a slow client."""
        state = self._client.state(slot)  # before the ring: what comes later is for the next time
        keeps_up = call.add([part for part in self._client.read_stream(slot) if part])
        if state != SlotState.STREAMING:
            call.slot = -1
            self._release(slot)
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

    def _release(self, slot: int) -> None:
        self._streams.discard(slot)
        self._waiting.pop(slot, None)
        self._client.release(slot)
