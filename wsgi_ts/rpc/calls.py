"""What all gRPC methods have in common: the token, the end of a call that fails, the access log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from wsgi_ts.dataplane.call_traces import CURRENT
from wsgi_ts.errors import InvalidKey, ServerError
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.logs.request_line import request_line
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.gate import GrpcGate
from wsgi_ts.rpc.load_report import LoadReport
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
        access: the access log.
        failure_of: how an error is said on this port.
        gate: the plugins that say who may ask; None for none.
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

    def service(self, name: str, *methods: Method) -> list[Method]:
        """Returns the methods of a service as the server takes them.

        Args:
            name: package and service.
            methods: each with its own name for a path, and raising errors of any kind.
        """
        return [
            replace(
                each, path=f"/{name}/{each.path}", run=partial(self._run, f"gRPC {name}/{each.path} HTTP/2.0", each)
            )
            for each in methods
        ]

    async def _run(self, line: str, method: Method, request: Any, rpc: RpcCall) -> Any:
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
            if self._load is not None:
                rpc.trailing_metadata += self._load.metadata()
            self._note(rpc.peer, line, code, began_ns)

    async def _answer(self, line: str, method: Method, request: Any, rpc: RpcCall) -> Any:
        """Returns what the method returns.

        Raises:
            Failure: whatever went wrong, in the words of this port.
        """
        try:
            if self._tokens is not None:
                self._admit(self._tokens, rpc)
            if self._gate is not None:
                request = await self._gate.admit(line, request, rpc)
            return await method.run(request, rpc)
        except ServerError as error:
            raise self._failure_of(error) from error
        except Failure:
            raise
        except Exception as error:
            log.exception("Unexpected error in %s", line)
            raise Failure(StatusCode.INTERNAL, _UNEXPECTED) from error

    def _admit(self, tokens: TokenTable, rpc: RpcCall) -> None:
        """Lets a call with the right token pass.

        Raises:
            InvalidKey: it has none, another one, or more than one: a proxy may have looked at the other.
        """
        tokens.refresh()
        given = [value for name, value in rpc.metadata if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not tokens.accepts(self._scope, given[0]):
            raise InvalidKey

    def _note(self, peer: str, line: str, code: StatusCode, began_ns: int) -> None:
        """One line for the access log, which leaves the process once per turn of the loop."""
        took_ns = time.monotonic_ns() - began_ns
        if self._is_json:
            self._access.add_line(_json_line(peer, line, code, took_ns))
        else:
            self._access.add("/" + peer, line, code.value, took_ns // 1_000_000)
        if not self._must_flush:
            self._must_flush = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._must_flush = False
        self._access.flush()


def _json_line(peer: str, line: str, code: StatusCode, took_ns: int) -> str:
    """The access log's line as JSON, by OpenTelemetry's names."""
    address, _, port = peer.rpartition(":")
    call = CURRENT.get()
    return request_line(
        took_ns,
        rpc__system__name="grpc",
        rpc__method=line.split(" ")[1],
        rpc__response__status_code=code.name,
        client__address=address,
        client__port=int(port) if port.isdigit() else None,
        **(call.log_fields() if call is not None else {}),
    )
