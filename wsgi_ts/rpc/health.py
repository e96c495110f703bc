"""gRPC's own health checking protocol (`grpc.health.v1`), which Kubernetes' gRPC probes and gRPC's clients speak.

It takes no token: probes have none. All services of a port are as ready as the server is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.status import StatusCode

NAME = f"{messages.HEALTH}.Health"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
#: How often a watch looks whether something has changed, in seconds.
_LOOK_EVERY_S = 0.1


class Health:
    """The methods of the service.

    Args:
        services: the full names of the other services of the port.

    Attributes:
        is_stopping: set when the server ends: so do the watches, which would keep it from it.
    """

    def __init__(self, is_ready: Callable[[], bool], services: Collection[str]) -> None:
        self._is_ready = is_ready
        self._services = {"", NAME, *services}
        self.is_stopping = False

    def service(self, calls: Calls) -> list[Method]:
        """Returns the methods, for the server."""
        messages_of = messages.HealthCheckRequest, messages.HealthCheckResponse
        return calls.service(
            NAME,
            Method("Check", self.check, *messages_of),
            Method("Watch", self.watch, *messages_of, answers_stream=True),
        )

    async def check(self, request: Any, rpc: RpcCall) -> Any:
        """SERVING or NOT_SERVING.

        Raises:
            Failure: there is no such service.
        """
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            raise Failure(StatusCode.NOT_FOUND, f"unknown service: {request.service}")
        return messages.HealthCheckResponse(status=status)

    async def watch(self, request: Any, rpc: RpcCall) -> None:
        """The status now, and each time that it changes, until the client leaves or the server ends."""
        last = None
        while not self.is_stopping:
            status = self._status(request.service)
            if status != last:
                await rpc.write(messages.HealthCheckResponse(status=status))
                last = status
            await asyncio.sleep(_LOOK_EVERY_S)

    def _status(self, service: str) -> int:
        if service not in self._services:
            return _SERVICE_UNKNOWN
        return _SERVING if self._is_ready() else _NOT_SERVING
