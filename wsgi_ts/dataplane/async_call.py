"""A request under way on an event loop, as whoever has submitted it sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from wsgi_ts.dataplane.call_traces import CallTrace
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.errors import PayloadTooLarge, ServerError

#: What an answer may have waiting for its client before the client counts as gone.
MAX_UNSENT: Final = 16 * 1024 * 1024


class CallPlane(Protocol):
    """What a call needs of where it was submitted (`wsgi_ts.dataplane.async_plane`)."""

    @property
    def most_response_bytes(self) -> int:
        """The largest answer that is taken whole."""

    @property
    def unsent(self) -> Ledger[Call]:
        """What all calls have waiting for their clients."""

    def forget(self, call: Call) -> None:
        """See `Call.close`."""


class Call:
    """One request under way: an iterator of the parts of its answer. `close` it in any case.

    There is one part, or as many as its handler sends, each as soon as it is there.

    Attributes:
        slot: where it lies; -1 once it is given back, or left to `AsyncPlane`.
        timer: ends it when its time is over; None for no limit.
        status, headers: of the answer, once it has begun.
        is_streamed: whether the beginning of a streamed answer has come.
    """

    __slots__ = (
        *("_ended", "_error", "_listener", "_news", "_parts", "_plane", "_unsent"),
        *("headers", "is_streamed", "request_id", "slot", "status", "target", "timer", "trace"),
    )

    def __init__(
        self, plane: CallPlane, slot: int, target: Target, request_id: str, trace: CallTrace | None = None
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
        self._listener: Callable[[], None] | None = None
        self._news: asyncio.Future[None] | None = None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Has `listener` called at each news, a part or the end, on the loop; None for no longer.

        With it a whole answer can be taken without a task that waits for it: see `is_over`, `is_streamed`, `result`.
        """
        self._listener = listener

    async def begin(self) -> None:
        """Waits for the beginning of the answer: `status`, `headers` and `is_streamed` are right then.

        Raises:
            ServerError: there is no answer.
        """
        while not (self._parts or self.is_streamed or self.is_over):
            await self._next()
        if self._error is not None and not self._parts:
            raise self._error

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> bytes:
        """Returns the next part of the answer.

        Raises:
            StopAsyncIteration: there is no further one.
            ServerError: there is no answer, or no more of it.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._next()
        part = self._parts.popleft()
        if self._unsent:
            self._hold(-len(part))
        return part

    def result(self) -> bytes:
        """Returns the answer of a call that `is_over` and was not streamed.

        Raises:
            ServerError: there is no answer.
        """
        if self._error is not None:
            raise self._error
        return self._parts[0]

    async def whole(self) -> bytes:
        """Returns all parts of the answer in one.

        Raises:
            ServerError: there is no answer, or it is larger than `max_response_size`.
        """
        parts = []
        length = 0
        limit = self._plane.most_response_bytes
        async for part in self:
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
        if self.trace is not None:
            self.trace.end(self.request_id, error)
        self._wake()

    async def _next(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _wake(self) -> None:
        if self._listener is not None:
            self._listener()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
