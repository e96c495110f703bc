"""One call: its messages, what it answers, and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from wsgi_ts.dataplane.call_traces import CallTrace
from wsgi_ts.http2.connection import Connection
from wsgi_ts.http2.stream import Stream
from wsgi_ts.rpc import wire
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.status import StatusCode

#: Bytes of messages that a method has not taken yet, above which the client of a stream is not told to send more.
_MOST_WAITING: Final = 1 << 20


class Work(Protocol):
    """What a call's method does: a task, or what `Method.begin` returns."""

    def cancel(self) -> object:
        """Ends it: nobody waits for it any more. After its end this does nothing."""


@dataclass(slots=True, eq=False, repr=False)
class Method:
    """A method of a service.

    Args:
        path: `/package.Service/Method`.
        run: takes the request (of a stream of requests: an iterator) and the call. It returns the answer, or writes its
            answers to the call; it raises Failure, and nothing else.
        request, response: the classes of its messages.
        takes_stream: any number of requests in place of one.
        answers_stream: any number of answers in place of one.
        begin: does what `run` does, without a task, and ends the call; None: there is no way without one.
    """

    path: str
    run: Callable[[Any, RpcCall], Awaitable[Any]]
    request: Any
    response: Any
    takes_stream: bool = False
    answers_stream: bool = False
    begin: Callable[[Any, RpcCall], Work] | None = None


class CallConnection(Protocol):
    """What a call needs of the connection that it came on."""

    @property
    def http2(self) -> Connection:
        """Its state."""

    @property
    def peer(self) -> str:
        """The client's address, `host:port`."""

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What the client has shown, verified; None where it has shown none."""

    def taken(self, call: RpcCall, length: int) -> None:
        """Lets the client send on, as so many bytes of the call's body were taken."""

    def flush_soon(self) -> None:
        """Sends what there is to send at the end of the loop's turn."""

    def forget(self, call: RpcCall) -> None:
        """Nothing more is to be sent for the call."""


class RpcCall:
    """A call under way.

    Args:
        limit: the largest message, in bytes.

    Attributes:
        reader: puts its messages together.
        work: what the method does, once the request is there; None before.
        trace: what is told of the prediction that it has submitted last; None for none.
        timer: ends the call when the client waits no longer; None for no end.
        trailing_metadata: what the answer's end tells beside the status.
    """

    __slots__ = (
        *("_connection", "_has_all", "_has_head", "_inbox", "_news", "_room", "head", "method", "reader", "stream"),
        *("_untold", "_waiting", "timer", "trace", "trailing_metadata", "work"),
    )

    def __init__(
        self, connection: CallConnection, stream: Stream, head: wire.RequestHead, method: Method, limit: int
    ) -> None:
        self.stream = stream
        self.head = head
        self.method = method
        self.reader = wire.MessageReader(head.encoding, limit)
        self.work: Work | None = None
        self.trace: CallTrace | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.trailing_metadata: list[tuple[str, str | bytes]] = []
        self._connection = connection
        self._inbox: deque[bytes] = deque()
        self._waiting = 0
        self._untold = 0
        self._has_all = False
        self._has_head = False
        self._news: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    @property
    def metadata(self) -> wire.Metadata:
        """What the client has sent beside its messages."""
        return self.head.metadata

    @property
    def peer(self) -> str:
        """The client's address, `host:port`."""
        return self._connection.peer

    @property
    def certificate(self) -> dict[str, Any] | None:
        """What the client has shown, verified; None where it has shown none."""
        return self._connection.certificate

    # What comes

    def receive(self, data: bytes, ends: bool) -> None:
        """Takes a part of what the client sends.

        Raises:
            Failure: it cannot be read.
        """
        messages = self.reader.feed(data) if data else []
        self._has_all = self._has_all or ends
        if ends and self.reader.held:
            raise Failure(StatusCode.INTERNAL, "The request ends within a message.")
        self._inbox += messages
        self._waiting += sum(map(len, messages))
        self._untold += len(data)
        self._tell()
        if self.method.takes_stream:
            _wake(self._news)
            if self.work is None:
                self._run_in_task(Requests(self))
        elif len(self._inbox) > 1:
            raise Failure(StatusCode.INTERNAL, "The method takes one message.")
        elif ends:
            if not self._inbox:
                raise Failure(StatusCode.INTERNAL, "The method takes one message, and none has come.")
            self._waiting = 0
            self._start(self._parsed(self._inbox.popleft()))

    async def next_request(self) -> Any:
        """Returns the next one of a stream of requests; None after the last one.

        Raises:
            Failure: it cannot be read.
        """
        while not self._inbox:
            if self._has_all:
                return None
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        message = self._inbox.popleft()
        self._waiting -= len(message)
        self._tell()
        return self._parsed(message)

    def _tell(self) -> None:
        """Lets the client send on, unless too much waits for the method."""
        if self._untold and self._waiting <= _MOST_WAITING:
            self._connection.taken(self, self._untold)
            self._untold = 0

    def _parsed(self, message: bytes) -> Any:
        try:
            return self.method.request.FromString(message)
        except DecodeError as error:
            name = self.method.request.DESCRIPTOR.full_name
            raise Failure(StatusCode.INTERNAL, f"The message is no {name}.") from error

    def _start(self, request: Any) -> None:
        begin = self.method.begin
        if begin is None:
            self._run_in_task(request)
        else:
            self.work = begin(request, self)

    def _run_in_task(self, request: Any) -> None:
        self.work = asyncio.get_running_loop().create_task(self._run(request))

    # What goes

    async def _run(self, request: Any) -> None:
        try:
            answer = await self.method.run(request, self)
        except Failure as failure:
            self.end(failure.code, failure.description)
        except asyncio.CancelledError:
            # Who cancels it has said what the client is told.
            self.end(StatusCode.CANCELLED, "The server is stopping.")
            raise
        else:
            if self.method.answers_stream:
                self.end(StatusCode.OK)
            else:
                self.answer(answer)

    def answer(self, message: Any) -> None:
        """Ends the call with its only answer."""
        self._send(message)
        self.end(StatusCode.OK)

    async def write(self, message: Any) -> None:
        """Sends an answer; waits until the client has room for it."""
        self._send(message)
        while self.stream.unsent:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _send(self, message: Any) -> None:
        http2 = self._connection.http2
        if not self._has_head:
            self._has_head = True
            http2.send_head(self.stream, wire.HEAD)
        http2.outbox.send_data(self.stream, wire.framed(message.SerializeToString()))
        self._connection.flush_soon()

    def has_room(self) -> None:
        """All that was written has gone."""
        _wake(self._room)

    def end(self, code: StatusCode, text: str = "") -> None:
        """Ends the call; the first end counts."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        stream, connection = self.stream, self._connection
        if not stream.is_answered:
            block = wire.status_block if self._has_head else wire.only_status
            connection.http2.outbox.send_trailers(stream, block(code, text, self.trailing_metadata))
            connection.flush_soon()
        connection.forget(self)

    def cancel(self) -> None:
        """Ends what the method does; nobody waits for it."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.work is not None:
            self.work.cancel()


class Requests:
    """The requests of a call that takes a stream of them, as an iterator."""

    def __init__(self, call: RpcCall) -> None:
        self._call = call

    def __aiter__(self) -> Requests:
        return self

    async def __anext__(self) -> Any:
        request = await self._call.next_request()
        if request is None:
            raise StopAsyncIteration
        return request


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
