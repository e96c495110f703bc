"""Plugins that say who may ask, for calls over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from wsgi_ts.plugins.api import Head
from wsgi_ts.plugins.auth import Decision, Gate
from wsgi_ts.plugins.threads import DaemonThreads
from wsgi_ts.rpc.call import RpcCall

_THREADS = 8
#: What the methods ask for; those that are not here ask for predictions of the model that their request names.
_ACTIONS = {
    **dict.fromkeys(("Ping", "ServerLive", "ServerReady"), "ping"),
    **dict.fromkeys(("DescribeModel", "ListModels", "ModelMetadata", "ModelReady", "ServerMetadata"), "describe"),
    **{"RegisterModel": "register", "ScaleWorker": "scale", "SetDefault": "scale", "UnregisterModel": "unregister"},
    **{"RepositoryIndex": "describe", "RepositoryModelLoad": "register", "RepositoryModelUnload": "unregister"},
}


class GrpcGate:
    """Lets calls pass."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._threads = DaemonThreads(_THREADS, "plugin auth")

    async def admit(self, line: str, request: Any, rpc: RpcCall) -> Any:
        """Lets a call pass; returns its request, or its stream of requests, each checked as it comes.

        `line` is `gRPC package.Service/Method HTTP/2.0`.

        Raises:
            ServerError: it may not pass.
        """
        path = "/" + line.split(" ")[1]
        headers = {name: value for name, value in rpc.metadata if isinstance(value, str)}
        peer = rpc.peer.rpartition(":")[0]
        head = Head("POST", path, "", headers, peer, rpc.certificate)
        if hasattr(request, "__aiter__"):
            return self._each(head, request)
        await self._check(head, request)
        return request

    async def _each(self, head: Head, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            await self._check(head, request)
            yield request

    async def _check(self, head: Head, request: Any) -> None:
        action = _ACTIONS.get(head.path.rpartition("/")[2], "predict")
        # KServe's clients send a model's name where the protocol has the repository's (`rpc.repository`).
        names = ("model_name", "name", "repository_name")
        model = next((name for name in (getattr(request, field, "") for field in names) if name), "")
        decision = self._gate.known(head, action, model)
        if decision is None:
            try:
                decision = await asyncio.wait_for(self._decide(head, action, model), self._gate.timeout_s)
            except asyncio.TimeoutError:
                raise self._gate.is_late() from None
        if decision.refusal is not None:
            raise decision.refusal

    async def _decide(self, head: Head, action: str, model: str) -> Decision:
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[Decision] = loop.create_future()

        def take(decision: Decision) -> None:
            if not decided.done():  # nobody may be waiting any more
                decided.set_result(decision)

        def decide() -> None:
            decision = self._gate.decide(head, action, model)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(take, decision)

        call = self._threads.submit(decide)
        try:
            return await decided
        except asyncio.CancelledError:
            call.interrupt()
            raise
