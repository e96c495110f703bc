"""gRPC's own health checking protocol (`grpc.health.v1`), which Kubernetes' gRPC probes and gRPC's clients speak.

It takes no token: probes have none. All services of a port are as ready as the server is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import grpc
from grpc import StatusCode, aio

from wsgi_ts.rpc import messages
from wsgi_ts.rpc.calls import TO_STREAM, UNARY, Calls
from wsgi_ts.rpc.codes import Failure

NAME = f"{messages.HEALTH}.Health"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
#: How often a watch looks whether something has changed, in seconds.
_LOOK_EVERY_S = 0.1


class Health:
    """The methods of the service.

    Args:
        is_ready: whether requests are welcome.
        services: the full names of the other services of the port.

    Attributes:
        is_stopping: set when the server ends: so do the watches, which would keep it from it.
    """

    def __init__(self, is_ready: Callable[[], bool], services: Collection[str]) -> None:
        self._is_ready = is_ready
        self._services = {"", NAME, *services}
        self.is_stopping = False

    def service(self, calls: Calls) -> grpc.GenericRpcHandler:
        """Returns the service, for the server."""
        request, response = messages.HealthCheckRequest, messages.HealthCheckResponse
        methods = {
            "Check": (self.check, request, response, UNARY),
            "Watch": (self.watch, request, response, TO_STREAM),
        }
        return grpc.method_handlers_generic_handler(
            NAME, {name: calls.method(f"{NAME}/{name}", *method) for name, method in methods.items()}
        )

    async def check(self, request: Any, context: aio.ServicerContext) -> Any:
        """SERVING or NOT_SERVING.

        Raises:
            Failure: there is no such service.
        """
        status = self._status(request.service)
        if status == _SERVICE_UNKNOWN:
            raise Failure(StatusCode.NOT_FOUND, f"unknown service: {request.service}")
        return messages.HealthCheckResponse(status=status)

    async def watch(self, request: Any, context: aio.ServicerContext) -> None:
        """The status now, and each time that it changes, until the client leaves or the server ends."""
        last = None
        while not self.is_stopping:
            status = self._status(request.service)
            if status != last:
                await context.write(messages.HealthCheckResponse(status=status))
                last = status
            await asyncio.sleep(_LOOK_EVERY_S)

    def _status(self, service: str) -> int:
        if service not in self._services:
            return _SERVICE_UNKNOWN
        return _SERVING if self._is_ready() else _NOT_SERVING
