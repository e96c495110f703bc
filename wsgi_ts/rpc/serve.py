"""The gRPC servers of one process, from the start to the end of their drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Sequence

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.dataplane.async_plane import AsyncPlane
from wsgi_ts.dataplane.server_load import ServerLoad
from wsgi_ts.instance.instance import Instance
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.models.repository import ModelRepository
from wsgi_ts.plugins.auth import load_gate
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.rpc.call import Method
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import inference_failure, management_failure
from wsgi_ts.rpc.connection import RpcConnection
from wsgi_ts.rpc.gate import GrpcGate
from wsgi_ts.rpc.health import Health
from wsgi_ts.rpc.inference import NAME as INFERENCE_SERVICE
from wsgi_ts.rpc.inference import Inference
from wsgi_ts.rpc.load_report import LoadReport
from wsgi_ts.rpc.management import NAME as MANAGEMENT_SERVICE
from wsgi_ts.rpc.management import Management
from wsgi_ts.rpc.open_inference import NAME as OPEN_INFERENCE_SERVICE
from wsgi_ts.rpc.open_inference import PROTOCOL_NAME, OpenInference
from wsgi_ts.rpc.port import Port
from wsgi_ts.rpc.repository import Repository
from wsgi_ts.security.access import TokenTable
from wsgi_ts.security.tokens import INFERENCE, MANAGEMENT
from wsgi_ts.settings.config import Config

_HEARTBEAT_S = 1.0
#: For the handshake of a TLS connection.
_HANDSHAKE_LIMIT_S = 8.0
_BACKLOG = 2048


class RpcServer:
    """Takes calls on a socket, and ends them."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self._listening: asyncio.Server | None = None

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Takes calls on a listening socket."""
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: RpcConnection(self.port),
            sock=sock,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else _HANDSHAKE_LIMIT_S,
            backlog=_BACKLOG,
        )

    async def stop(self, grace_s: float) -> None:
        """Takes no further calls; ends those under way after so many seconds. Call it again to hasten it."""
        port = self.port
        if self._listening is not None:
            self._listening.close()
        for connection in list(port.connections):
            connection.leave()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(port.wait_until_empty(), grace_s)
        for connection in list(port.connections):
            connection.end_calls()
        await port.wait_until_empty()


async def serve(
    instance: Instance, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None, ready_fd: int
) -> None:
    """Serves until a signal says stop, then ends what is under way.

    The sockets, those of the inference and of the management API, listen already. `ready_fd` gets a byte when calls are
    taken, and then one each second; -1 for none.

    Raises:
        OSError: there is no shared memory.
    """
    loop = asyncio.get_running_loop()
    config = instance.config
    stop: asyncio.Queue[float] = asyncio.Queue()
    loop.add_signal_handler(signal.SIGTERM, stop.put_nowait, float(config.graceful_timeout))
    loop.add_signal_handler(signal.SIGQUIT, stop.put_nowait, 0.0)
    loop.add_signal_handler(signal.SIGUSR1, instance.log_files.reopen)
    plane = AsyncPlane(instance, loop)
    access = AccessLog(instance.log_files.access)
    health, servers = _servers(instance, plane, access)
    for server, sock in zip(servers, sockets, strict=True):
        await server.start(sock, tls)
    heart = asyncio.create_task(_beat(ready_fd)) if ready_fd >= 0 else None
    await _stop(servers, health, stop)
    access.flush()
    if heart is not None:
        heart.cancel()


def _servers(instance: Instance, plane: AsyncPlane, access: AccessLog) -> tuple[Health, list[RpcServer]]:
    """Makes the servers of the inference and of the management API."""
    config = instance.config
    tokens = TokenTable(instance.run_dir, plane.board) if config.token_authorization else None
    plugins = load_gate(config, PluginReport(instance.run_dir, "gRPC server"))
    gate = None if plugins is None else GrpcGate(plugins)
    is_json = config.log_format == "json"
    load = LoadReport(ServerLoad(plane.board, plane.routes)) if config.endpoint_load_metrics else None
    calls = Calls(INFERENCE, tokens, access, inference_failure, gate, load, is_json=is_json)
    managing = Calls(MANAGEMENT, tokens, access, management_failure, gate, is_json=is_json)
    control = ControlPlane(instance.run_dir)
    management = Management(instance, control)
    managed = management.service(managing)
    methods = Inference(plane, config).service(calls)
    names = [INFERENCE_SERVICE, MANAGEMENT_SERVICE]
    if config.ts_open_inference_protocol:
        open_inference = OpenInference(plane, management)
        repository = Repository(ModelRepository(config, control), management)
        for name in (OPEN_INFERENCE_SERVICE, PROTOCOL_NAME):
            methods += open_inference.service(calls, name)
            managed += repository.service(managing, name)
            names.append(name)
    health = Health(lambda: plane.routes.ready, names)
    healths = health.service(Calls(INFERENCE, None, access, inference_failure, is_json=is_json))
    ages = config.grpc_inference_max_connection_age_ms, config.grpc_inference_max_connection_age_grace_ms
    serving = _server(config, [*methods, *healths], *ages)
    ages = config.grpc_management_max_connection_age_ms, config.grpc_management_max_connection_age_grace_ms
    return health, [serving, _server(config, [*managed, *healths], *ages)]


def _server(config: Config, methods: Sequence[Method], age_ms: int | None, grace_ms: int | None) -> RpcServer:
    age_s, grace_s = (None if each is None else each / 1000 for each in (age_ms, grace_ms))
    return RpcServer(Port(methods, config.max_request_size, age_s, grace_s))


async def _beat(ready_fd: int) -> None:
    """Tells the supervisor that the loop runs. One that is gone kills this process anyhow."""
    while True:
        os.write(ready_fd, b"+")
        await asyncio.sleep(_HEARTBEAT_S)


async def _stop(servers: Sequence[RpcServer], health: Health, stop: asyncio.Queue[float]) -> None:
    """Waits for the first request to stop, and hastens the drain at the second."""
    grace_s = await stop.get()
    health.is_stopping = True
    draining = asyncio.gather(*(server.stop(grace_s) for server in servers))
    hastening = asyncio.create_task(_hasten(servers, stop))
    await draining
    hastening.cancel()


async def _hasten(servers: Sequence[RpcServer], stop: asyncio.Queue[float]) -> None:
    grace_s = await stop.get()
    await asyncio.gather(*(server.stop(grace_s) for server in servers))
