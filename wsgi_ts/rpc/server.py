"""The gRPC servers of one process, from the start to the end of their drain."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal

import grpc
from grpc import aio

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.dataplane.async_plane import AsyncPlane
from wsgi_ts.instance.instance import Instance
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.plugins.auth import load_gate
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import inference_failure, management_failure
from wsgi_ts.rpc.gate import GrpcGate
from wsgi_ts.rpc.health import Health
from wsgi_ts.rpc.inference import NAME as INFERENCE_SERVICE
from wsgi_ts.rpc.inference import Inference
from wsgi_ts.rpc.management import NAME as MANAGEMENT_SERVICE
from wsgi_ts.rpc.management import Management
from wsgi_ts.rpc.open_inference import NAME as OPEN_INFERENCE_SERVICE
from wsgi_ts.rpc.open_inference import PROTOCOL_NAME, OpenInference
from wsgi_ts.security.access import TokenTable
from wsgi_ts.security.tokens import INFERENCE, MANAGEMENT
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

#: Calls of one port at a time, streams among them; further ones are refused with RESOURCE_EXHAUSTED.
MAX_CALLS = 10_000
_HEARTBEAT_S = 1.0
#: The largest number that gRPC's options take.
_INT32_MAX = 2**31 - 1
_PEM_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n?", re.DOTALL)


def credentials(pem: bytes) -> grpc.ServerCredentials:
    """Returns the TLS credentials in a PEM text that holds the key and then the certificates."""
    key = _PEM_KEY.search(pem)
    if key is None:
        raise ValueError("no private key in the TLS settings")
    return grpc.ssl_server_credentials([(key[0], pem[key.end() :])])


async def serve(
    instance: Instance, addresses: tuple[str, str], tls: grpc.ServerCredentials | None, ready_fd: int
) -> None:
    """Serves until a signal says stop, then ends what is under way.

    Args:
        instance: the instance.
        addresses: `host:port` of the inference and of the management API.
        tls: what they are served with; None for plain text.
        ready_fd: gets a byte when calls are taken, and then one each second; -1 for none.

    Raises:
        OSError: a port cannot be listened on, or there is no shared memory.
    """
    loop = asyncio.get_running_loop()
    config = instance.config
    stop: asyncio.Queue[float] = asyncio.Queue()
    loop.add_signal_handler(signal.SIGTERM, stop.put_nowait, float(config.graceful_timeout))
    loop.add_signal_handler(signal.SIGQUIT, stop.put_nowait, 0.0)
    loop.add_signal_handler(signal.SIGUSR1, instance.log_files.reopen)
    plane = AsyncPlane(instance, loop)
    access = AccessLog(instance.log_files.access)
    tokens = TokenTable(instance.run_dir, plane.board) if config.token_authorization else None
    report = PluginReport(instance.run_dir, "gRPC server")
    plugins = load_gate(config, report)
    gate = None if plugins is None else GrpcGate(plugins)
    calls = Calls(INFERENCE, tokens, access, inference_failure, gate)
    management = Management(instance, ControlPlane(instance.run_dir))
    services = {INFERENCE_SERVICE: Inference(plane, config).service(calls)}
    if config.ts_open_inference_protocol:
        open_inference = OpenInference(plane, management)
        services |= {name: open_inference.service(calls, name) for name in (OPEN_INFERENCE_SERVICE, PROTOCOL_NAME)}
    open_calls = Calls(INFERENCE, None, access, inference_failure)
    health = Health(lambda: plane.routes.ready, [*services, MANAGEMENT_SERVICE])
    ages = config.grpc_inference_max_connection_age_ms, config.grpc_inference_max_connection_age_grace_ms
    servers = [_server(config, [*services.values(), health.service(open_calls)], ages)]
    ages = config.grpc_management_max_connection_age_ms, config.grpc_management_max_connection_age_grace_ms
    managing = Calls(MANAGEMENT, tokens, access, management_failure, gate)
    servers.append(_server(config, [management.service(managing), health.service(open_calls)], ages))
    for server, address in zip(servers, addresses, strict=True):
        _bind(server, address, tls)
        await server.start()
    heart = asyncio.create_task(_beat(ready_fd)) if ready_fd >= 0 else None
    await _stop(servers, health, stop)
    access.flush()
    if heart is not None:
        heart.cancel()


def _server(
    config: Config, services: list[grpc.GenericRpcHandler], ages_ms: tuple[int | None, int | None]
) -> aio.Server:
    options = {
        "grpc.max_receive_message_length": config.max_request_size,
        "grpc.max_send_message_length": -1,
        "grpc.max_connection_age_ms": ages_ms[0],
        "grpc.max_connection_age_grace_ms": ages_ms[1],
        # The supervisor holds the port: it is bound beside it (`wsgi_ts.instance.listeners`).
        "grpc.so_reuseport": 1,
        # A burst waits until the loop comes to it; by default gRPC cancels calls from the 1000th on.
        "grpc.server.max_pending_requests": MAX_CALLS,
        "grpc.server.max_pending_requests_hard_limit": MAX_CALLS,
    }
    given = [(name, min(value, _INT32_MAX)) for name, value in options.items() if value is not None]
    server = aio.server(options=given, maximum_concurrent_rpcs=MAX_CALLS)
    server.add_generic_rpc_handlers(services)
    return server


def _bind(server: aio.Server, address: str, tls: grpc.ServerCredentials | None) -> None:
    try:
        if tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, tls)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}: {error}") from error


async def _beat(ready_fd: int) -> None:
    """Tells the supervisor that the loop runs. One that is gone kills this process anyhow."""
    while True:
        os.write(ready_fd, b"+")
        await asyncio.sleep(_HEARTBEAT_S)


async def _stop(servers: list[aio.Server], health: Health, stop: asyncio.Queue[float]) -> None:
    """Waits for the first request to stop, and hastens the drain at the second."""
    grace_s = await stop.get()
    health.is_stopping = True
    draining = asyncio.gather(*(server.stop(grace_s) for server in servers))
    hastening = asyncio.create_task(_hasten(servers, stop))
    await draining
    hastening.cancel()


async def _hasten(servers: list[aio.Server], stop: asyncio.Queue[float]) -> None:
    grace_s = await stop.get()
    await asyncio.gather(*(server.stop(grace_s) for server in servers))
