"""What Kubernetes asks of a server from its start to its end: probes, and an end at which no request is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from lifecycle.pods import OtherPod, Service
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient, failure, health_pb2
from support.server import ServerProcess

#: Loads once its file is there.
GATED = """
import os, time

def handle(data, context):
    if data is None:
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.02)
        return None
    return [row["body"] for row in data]
"""
#: Answers once its file is there.
HELD = """
import os, time

def handle(data, context):
    if data is None:
        return None
    open(os.environ["GATE"] + ".running", "w").close()
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.02)
    return [row.get("body") or row.get("data") for row in data]
"""
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
INFERENCE = "org.pytorch.serve.grpc.inference.InferenceAPIsService"


def probe(server: ServerProcess, path: str) -> int:
    """The status of a probe, as Kubernetes sends it: without a token."""
    return server.request("inference", "GET", path).status


def terminate(server: ServerProcess) -> None:
    """Sends SIGTERM to the process that a user has started."""
    os.kill(server.record["pid"], signal.SIGTERM)


def ended_well(server: ServerProcess) -> bool:
    return server.returncode == 0


def health(client: GrpcClient, service: str = "") -> int:
    """What gRPC's health service says."""
    status: int = client.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status
    return status


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def stopping(tmp_path: Path, gate: Path) -> Iterator[ServerProcess]:
    """A server that serves on for an hour after SIGTERM."""
    store = tmp_path / "store"
    store.mkdir()
    archive(store, "echo")
    archive(store, "held", HELD)
    with ServerProcess(
        store=store, arguments=["--drain-delay", "3600"], environment={"GATE": os.fspath(gate)}
    ) as server:
        for name in ("echo", "held"):
            assert server.register(f"{name}.mar").status == 200
        yield server


def test_probes_tell_when_the_first_models_are_loaded(store: Path, gate: Path, start_server: Any) -> None:
    archive(store, "gated", GATED)
    config = {"disable_token_authorization": "false", "ts_open_inference_protocol": "true"}
    arguments = ["--models", "gated.mar"]
    server = start_server(store=store, config=config, arguments=arguments, environment={"GATE": os.fspath(gate)})
    assert [probe(server, path) for path in ("/livez", "/readyz", "/startupz")] == [200, 503, 503]
    assert server.request("inference", "GET", "/readyz").json() == {"ready": False}
    assert server.request("inference", "GET", "/ping").status == 400, "a token is asked for"
    with GrpcClient(server) as client:
        assert health(client) == health(client, INFERENCE) == NOT_SERVING
        watch = client.health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == NOT_SERVING
        gate.touch()
        assert next(watch).status == SERVING
        eventually(lambda: probe(server, "/readyz") == 200, within=10)
        assert [probe(server, path) for path in ("/livez", "/startupz")] == [200, 200]
        assert health(client, INFERENCE) == SERVING
        assert failure(lambda: health(client, "no.such.Service"))[0] == grpc.StatusCode.NOT_FOUND
        unknown = client.health.Watch(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=60)
        assert next(unknown).status == SERVICE_UNKNOWN
        key = json.loads((server.home / "key_file.json").read_text())["inference"]["key"]
        reply = server.request("inference", "GET", "/v2/health/ready", headers={"authorization": f"Bearer {key}"})
        assert (reply.status, reply.json()) == (200, {"ready": True})


def test_it_is_not_ready_while_no_model_can_be_answered(store: Path, start_server: Any) -> None:
    """One model that has lost its workers is its own affair; without any that works the server is of no use."""
    for name in ("one", "two"):
        archive(store, name)
    server = start_server(store=store)
    assert probe(server, "/readyz") == 200, "without a model that should have workers"
    for name in ("one", "two"):
        assert server.register(f"{name}.mar").status == 200
    archive(store, "broken", "raise RuntimeError('never')")
    (server.store / "broken.mar").write_bytes((store / "broken.mar").read_bytes())
    assert server.register("broken.mar", synchronous="false").status == 202
    assert probe(server, "/readyz") == 200
    for name in ("one", "two"):
        assert server.request("management", "DELETE", f"/models/{name}").status == 200
    eventually(lambda: probe(server, "/readyz") == 503, within=10)
    assert [probe(server, path) for path in ("/livez", "/startupz")] == [200, 200]


def test_from_the_first_sigterm_on_it_serves_and_says_that_it_leaves(stopping: ServerProcess, gate: Path) -> None:
    gate.touch()
    with stopping.raw() as kept, GrpcClient(stopping) as client, ThreadPoolExecutor() as pool:
        kept.send(b"POST /predictions/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n1")
        assert kept.read_answer()[1].get("connection") != "close"
        watch = client.health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == SERVING
        terminate(stopping)
        assert next(watch).status == NOT_SERVING
        eventually(lambda: probe(stopping, "/readyz") == 503, within=5)
        assert [probe(stopping, path) for path in ("/livez", "/ping")] == [200, 500]
        # A connection that was open before is ended with its next answer; new ones are taken, and ended, too.
        kept.send(b"POST /predictions/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n2")
        line, headers, body = kept.read_answer()
        assert (line, headers["connection"], body) == (b"HTTP/1.1 200 ", "close", b"2")
        reply = stopping.predict("echo", b"3")
        assert (reply.status, reply.headers["connection"], reply.body) == (200, "close", b"3")
        assert client.predict("held", b"4") == b"4"
        assert stopping.register("echo.mar", model_name="late").status == 503
        # The second one means now.
        gate.unlink()
        Path(f"{gate}.running").unlink()
        held = pool.submit(stopping.predict, "held", b"5")
        eventually(Path(f"{gate}.running").exists, within=10)
        terminate(stopping)
        eventually(lambda: ended_well(stopping), within=15)
        assert held.exception() is not None or held.result().status == 503


def test_a_drain_ends_what_is_under_way_and_says_goaway(store: Path, gate: Path, start_server: Any) -> None:
    archive(store, "held", HELD)
    server = start_server(store=store, environment={"GATE": os.fspath(gate)})
    assert server.register("held.mar", initial_workers=2).status == 200
    with GrpcClient(server) as client, ThreadPoolExecutor() as pool, http_2(server) as connection:
        over_http = pool.submit(server.predict, "held", b"1")
        eventually(Path(f"{gate}.running").exists, within=10)
        Path(f"{gate}.running").unlink()
        over_grpc = pool.submit(client.predict, "held", b"2")
        eventually(Path(f"{gate}.running").exists, within=10)
        terminate(server)
        assert says_goaway(connection)
        connection.close()
        gate.touch()
        assert over_http.result().body == b"1"
        assert over_grpc.result() == b"2"
        eventually(lambda: ended_well(server), within=15)


def http_2(server: ServerProcess) -> socket.socket:
    """A connection to the gRPC port that has said hello: the preface, and a SETTINGS frame without settings."""
    sock = socket.create_connection(("127.0.0.1", server.ports["grpc_inference"]), timeout=30)
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
    return sock


def says_goaway(sock: socket.socket) -> bool:
    """Reads the frames of an HTTP/2 server until there is one that asks to go (type 7)."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
        while len(data) >= 9 + int.from_bytes(data[:3], "big"):
            if data[3] == 7:
                return True
            data = data[9 + int.from_bytes(data[:3], "big") :]
    return False


def test_a_client_that_keeps_its_connection_is_answered_after_the_stop(store: Path, start_server: Any) -> None:
    """Without a drain delay: it cannot know of the stop before that answer, or before its connection is closed."""
    archive(store, "echo")
    server: ServerProcess = start_server(store=store)
    assert server.register("echo.mar").status == 200
    ask = b"POST /predictions/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n"
    with server.raw() as used, server.raw() as idle:
        for connection in (used, idle):
            connection.send(ask + b"1")
            assert connection.read_answer()[2] == b"1"
        terminate(server)
        eventually(lambda: is_refused(server), within=10)
        used.send(ask + b"2")
        line, headers, body = used.read_answer()
        assert (line, headers["connection"], body) == (b"HTTP/1.1 200 ", "close", b"2")
        eventually(lambda: ended_well(server), within=15)
        assert idle.sock.recv(1) == b"", "one that sends nothing more keeps the server for a moment only"


def is_refused(server: ServerProcess) -> bool:
    """Whether a new connection is."""
    try:
        server.raw().sock.close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("late_s", [0, 2, pytest.param(10, marks=pytest.mark.slow)])
def test_no_request_is_lost(store: Path, start_server: Any, late_s: int) -> None:
    """SIGTERM, and the service forgets the address later; `--drain-delay` is longer than that takes, by far."""
    archive(store, "echo")
    server: ServerProcess = start_server(store=store, web_workers=2, arguments=["--drain-delay", str(late_s + 8)])
    assert server.register("echo.mar").status == 200
    port = server.ports["inference"]
    with OtherPod() as other, Service([port, port, other], "/predictions/echo") as service:
        eventually(lambda: service.answered[port] > 200, within=30)
        service.end(port, lambda: terminate(server), late_s)
        eventually(lambda: ended_well(server), within=late_s + 30)
        at_end = service.outcomes.total()
        eventually(lambda: service.outcomes.total() > at_end + 50, within=30)
    assert service.outcomes.keys() == {"ok"}, service.outcomes
