"""What all gRPC methods have in common: the token, the end of a call that fails, the access log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from wsgi_ts.dataplane.call_traces import CallTrace
from wsgi_ts.dataplane.http_facts import client_of
from wsgi_ts.errors import InvalidKey, ServerError
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.logs.request_line import request_line
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.gate import GrpcGate
from wsgi_ts.rpc.load_report import LoadReport
from wsgi_ts.rpc.prediction import Prediction, PredictionMethod
from wsgi_ts.rpc.status import StatusCode
from wsgi_ts.security.access import TokenTable

log = logging.getLogger(__name__)

#: All that a client learns of a defect of the server.
_UNEXPECTED = "Internal server error; the server's log tells more."


class Calls:
    """The calls of one port.

    Args:
        scope: whose token they take (`wsgi_ts.security.tokens`).
        tokens: the keys; None where calls need no token.
        failure_of: how an error is said on this port.
        load: tells at the end of each call how busy the server is; None: calls do not tell.
        is_json: the access log has JSON instead of TorchServe's lines.
    """

    def __init__(
        self,
        scope: str,
        tokens: TokenTable | None,
        access: AccessLog,
        failure_of: Callable[[ServerError], Failure],
        gate: GrpcGate | None = None,
        load: LoadReport | None = None,
        *,
        is_json: bool = False,
    ) -> None:
        self._gate = gate
        self._load = load
        self._scope = scope
        self._tokens = tokens
        self._access = access
        self._failure_of = failure_of
        self._is_json = is_json
        self._must_flush = False

    def service(self, name: str, *methods: Method | PredictionMethod) -> list[Method]:
        """Returns the methods of a service as the server takes them.

        Each comes with its own name for a path, and raises errors of any kind.
        """
        return [self._method(f"/{name}/{each.path}", f"gRPC {name}/{each.path} HTTP/2.0", each) for each in methods]

    def _method(self, path: str, line: str, method: Method | PredictionMethod) -> Method:
        run = partial(self._run, line, method)
        if isinstance(method, Method):
            return Method(
                path,
                run,
                method.request,
                method.response,
                takes_stream=method.takes_stream,
                answers_stream=method.answers_stream,
            )
        # Plugins may take their time before they let a call pass.
        begin = partial(self._begin, line, method) if self._gate is None else None
        return Method(path, run, method.request, method.response, begin=begin)

    def _begin(self, line: str, method: PredictionMethod, request: Any, rpc: RpcCall) -> Prediction:
        prediction = Prediction(self, line, method, rpc)
        prediction.begin(request)
        return prediction

    async def _run(self, line: str, method: Method | PredictionMethod, request: Any, rpc: RpcCall) -> Any:
        began_ns = time.monotonic_ns()
        code = StatusCode.CANCELLED  # unless it comes to another end
        try:
            answer = await self._answer(line, method, request, rpc)
            code = StatusCode.OK
            return answer
        except Failure as failure:
            code = failure.code
            raise
        finally:
            self.note_end(rpc, line, code, began_ns)

    async def _answer(self, line: str, method: Method | PredictionMethod, request: Any, rpc: RpcCall) -> Any:
        """Returns what the method returns.

        Raises:
            Failure: whatever went wrong, in the words of this port.
        """
        try:
            self.admit(rpc)
            if self._gate is not None:
                request = await self._gate.admit(line, request, rpc)
            return await method.run(request, rpc)
        except Failure:
            raise
        except Exception as error:
            raise self.failure(line, error) from error

    def failure(self, line: str, error: Exception) -> Failure:
        """Returns how an error is said on this port."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, ServerError):
            return self._failure_of(error)
        log.error("Unexpected error in %s", line, exc_info=error)
        return Failure(StatusCode.INTERNAL, _UNEXPECTED)

    def admit(self, rpc: RpcCall) -> None:
        """Lets a call with the right token pass.

        Raises:
            InvalidKey: it has none, another one, or more than one: a proxy may have looked at the other.
        """
        tokens = self._tokens
        if tokens is None:
            return
        tokens.refresh()
        given = [value for name, value in rpc.metadata if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not tokens.accepts(self._scope, given[0]):
            raise InvalidKey

    def note_end(self, rpc: RpcCall, line: str, code: StatusCode, began_ns: int) -> None:
        """Writes a call into the access log, and lets it tell how busy the server is.

        The log leaves the process once per turn of the loop.

        `line` is the log's, `began_ns` monotonic.
        """
        if self._load is not None:
            rpc.trailing_metadata += self._load.metadata()
        took_ns = time.monotonic_ns() - began_ns
        if self._is_json:
            self._access.add_line(_json_line(rpc.peer, line, code, took_ns, rpc.trace))
        else:
            self._access.add("/" + rpc.peer, line, code.value, took_ns // 1_000_000)
        if not self._must_flush:
            self._must_flush = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._must_flush = False
        self._access.flush()


def _json_line(peer: str, line: str, code: StatusCode, took_ns: int, trace: CallTrace | None) -> str:
    """The access log's line as JSON, by OpenTelemetry's names."""
    address, port = client_of(peer)
    fields = {
        "rpc.system.name": "grpc",
        "rpc.method": line.split(" ")[1],
        "rpc.response.status_code": code.name,
        "client.address": address,
        "client.port": port,
    }
    return request_line(took_ns, {**fields, **(trace.log_fields() if trace is not None else {})})
