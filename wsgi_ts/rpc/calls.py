"""What all gRPC methods have in common: the token, the end of a call that fails, the access log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc
from grpc import StatusCode, aio

from wsgi_ts.errors import InvalidKey, ServerError
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.gate import GrpcGate
from wsgi_ts.security.access import TokenTable

log = logging.getLogger(__name__)

#: A method: takes the request (of a stream of requests: an iterator) and the call's context. It returns the answer, or
#: writes its answers to the context.
Method = Callable[[Any, aio.ServicerContext], Awaitable[Any]]
#: One request and one answer; one request and any number of answers; any number of both.
UNARY = grpc.unary_unary_rpc_method_handler
TO_STREAM = grpc.unary_stream_rpc_method_handler
STREAMS = grpc.stream_stream_rpc_method_handler
#: All that a client learns of a defect of the server.
_UNEXPECTED = "Internal server error; the server's log tells more."


class Calls:
    """The calls of one port.

    Args:
        scope: whose token they take (`wsgi_ts.security.tokens`).
        tokens: the keys; None where calls need no token.
        access: the access log.
        failure_of: how an error is said on this port.
        gate: the plugins that say who may ask; None for none.
    """

    def __init__(
        self,
        scope: str,
        tokens: TokenTable | None,
        access: AccessLog,
        failure_of: Callable[[ServerError], Failure],
        gate: GrpcGate | None = None,
    ) -> None:
        self._gate = gate
        self._scope = scope
        self._tokens = tokens
        self._access = access
        self._failure_of = failure_of
        self._must_flush = False

    def method(
        self, line: str, method: Method, request: Any, response: Any, kind: Callable[..., Any] = UNARY
    ) -> grpc.RpcMethodHandler:
        """Makes a method for `grpc.method_handlers_generic_handler`.

        Args:
            line: package, service and method.
            method: what it does.
            request: the class of its requests.
            response: the class of its answers.
            kind: UNARY, TO_STREAM or STREAMS.
        """
        run = partial(self._run, f"gRPC {line} HTTP/2.0", method)
        return kind(run, request.FromString, response.SerializeToString)

    async def _run(self, line: str, method: Method, request: Any, context: aio.ServicerContext) -> Any:
        began_ns = time.monotonic_ns()
        code = StatusCode.CANCELLED  # unless it comes to another end
        try:
            answer = await self._answer(line, method, request, context)
            code = StatusCode.OK
            return answer
        except Failure as failure:
            code = failure.code
            # Raises, so that nothing is sent any more.
            await context.abort(code, failure.description)
        finally:
            self._note(context.peer(), line, code, began_ns)

    async def _answer(self, line: str, method: Method, request: Any, context: aio.ServicerContext) -> Any:
        """Returns what the method returns.

        Raises:
            Failure: whatever went wrong, in the words of this port.
        """
        try:
            if self._tokens is not None:
                self._admit(self._tokens, context)
            if self._gate is not None:
                request = await self._gate.admit(line, request, context)
            return await method(request, context)
        except ServerError as error:
            raise self._failure_of(error) from error
        except Failure:
            raise
        except Exception as error:
            log.exception("Unexpected error in %s", line)
            raise Failure(StatusCode.INTERNAL, _UNEXPECTED) from error

    def _admit(self, tokens: TokenTable, context: aio.ServicerContext) -> None:
        """Lets a call with the right token pass.

        Raises:
            InvalidKey: it has none, or another one.
        """
        tokens.refresh()
        for name, value in context.invocation_metadata() or ():
            if name == "authorization" and isinstance(value, str) and tokens.accepts(self._scope, value):
                return
        raise InvalidKey

    def _note(self, peer: str, line: str, code: StatusCode, began_ns: int) -> None:
        """One line for the access log, which leaves the process once per turn of the loop."""
        took_ms = (time.monotonic_ns() - began_ns) // 1_000_000
        self._access.add(_remote(peer), line, code.value[0], took_ms)
        if not self._must_flush:
            self._must_flush = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._must_flush = False
        self._access.flush()


def _remote(peer: str) -> str:
    """A peer as gRPC names it ("ipv4:127.0.0.1:7", "ipv6:%5B::1%5D:7") in the access log's form ("/127.0.0.1:7")."""
    return "/" + unquote(peer.partition(":")[2])
