"""Calls that one prediction answers: most calls are no more than that, and get along without a task."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from wsgi_ts.dataplane.async_call import Call
from wsgi_ts.rpc.call import RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.status import StatusCode


@dataclass(slots=True, eq=False, repr=False)
class PredictionMethod:
    """A method that one prediction answers.

    Args:
        path: its own name.
        submit: submits the prediction that a request asks for. It raises Failure or ServerError.
        answer: makes the message for what the prediction has answered.
    """

    path: str
    request: Any
    response: Any
    submit: Callable[[Any, RpcCall], Call]
    answer: Callable[[bytes], Any]

    async def run(self, request: Any, rpc: RpcCall) -> Any:
        """Returns the answer to a request, in a task.

        Raises:
            Failure, ServerError: there is none.
        """
        call = self.submit(request, rpc)
        try:
            return self.answer(await call.whole())
        finally:
            call.close()


class PortCalls(Protocol):
    """What a prediction needs of the calls of its port (`wsgi_ts.rpc.calls`)."""

    def admit(self, rpc: RpcCall) -> None:
        """Lets a call with the right token pass; raises InvalidKey for others."""

    def failure(self, line: str, error: Exception) -> Failure:
        """Returns how an error is said on this port."""

    def note_end(self, rpc: RpcCall, line: str, code: StatusCode, began_ns: int) -> None:
        """Writes the call into the access log."""


class Prediction:
    """One call, from its request to its answer; `begin` it."""

    __slots__ = ("_began_ns", "_call", "_is_over", "_line", "_method", "_port", "_rpc", "_task")

    def __init__(self, port: PortCalls, line: str, method: PredictionMethod, rpc: RpcCall) -> None:
        self._port = port
        self._line = line
        self._method = method
        self._rpc = rpc
        self._began_ns = time.monotonic_ns()
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_over = False

    def begin(self, request: Any) -> None:
        """Submits the prediction; ends the call where it is refused."""
        try:
            self._port.admit(self._rpc)
            call = self._method.submit(request, self._rpc)
        except Exception as error:
            self._fail(error)
            return
        self._call = call
        call.listen(self._on_news)

    def cancel(self) -> None:
        """Withdraws it: nobody waits for it any more."""
        self._note_end(StatusCode.CANCELLED)
        if self._task is not None:
            self._task.cancel()

    def _on_news(self) -> None:
        call = self._call
        assert call is not None
        if call.is_streamed:
            # All parts together, as they come.
            call.listen(None)
            self._task = asyncio.get_running_loop().create_task(self._take_parts(call))
            return
        try:
            self._answer(call.result())
        except Exception as error:
            self._fail(error)

    async def _take_parts(self, call: Call) -> None:
        try:
            self._answer(await call.whole())
        except Exception as error:
            self._fail(error)

    def _answer(self, prediction: bytes) -> None:
        message = self._method.answer(prediction)
        self._note_end(StatusCode.OK)
        self._rpc.answer(message)

    def _fail(self, error: Exception) -> None:
        failure = self._port.failure(self._line, error)
        self._note_end(failure.code)
        self._rpc.end(failure.code, failure.description)

    def _note_end(self, code: StatusCode) -> None:
        """Gives back what it has, and writes the access log; the first end counts.

        Before the answer leaves, as that may end with the load.
        """
        if self._is_over:
            return
        self._is_over = True
        call = self._call
        if call is not None:
            call.listen(None)
            call.close()
        self._port.note_end(self._rpc, self._line, code, self._began_ns)
