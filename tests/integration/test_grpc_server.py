"""The gRPC management API, and the life of the process that serves both APIs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import faults
from support.archives import archive
from support.authority import Authority
from support.eventually import eventually
from support.grpc_client import GrpcClient, failure, held, inference_pb2, management_pb2, request
from support.grpc_models import DESCRIBED, ECHO, ECHO_STREAM, SEEN, STEPS
from support.server import REPOSITORY, ServerProcess

MANAGEMENT = "org.pytorch.serve.grpc.management.ManagementAPIsService"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with some models."""
    store = tmp_path_factory.mktemp("store")
    handlers = {"seen": SEEN, "echo": ECHO, "echo_stream": ECHO_STREAM, "described": DESCRIBED}
    for name, source in handlers.items():
        archive(store, name, source)
    archive(store, "steps", STEPS, config_yaml="continuousBatching: true\nbatchSize: 4")
    archive(store, "idle", ECHO)
    archive(store, "new", ECHO)
    archive(store, "new", ECHO, version="2.0", file_name="new2.mar")
    with ServerProcess(store=store) as running:
        for name in (*handlers, "steps"):
            assert running.register(f"{name}.mar").status == 200
        assert running.register("idle.mar", initial_workers=0).status == 200
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[GrpcClient]:
    with GrpcClient(server) as made:
        yield made


def answers_again(client: GrpcClient) -> bool:
    """Whether a prediction is answered."""
    try:
        return client.predict("echo", b"again", timeout=30) == b"again"
    except grpc.RpcError:
        return False


# Management


def register(client: GrpcClient, url: str, **fields: Any) -> str:
    message = management_pb2.RegisterModelRequest(url=url, initial_workers=1, synchronous=True, **fields)
    return client.manage("RegisterModel", message)


def test_a_models_life(server: ServerProcess, client: GrpcClient) -> None:
    assert register(client, "new.mar") == 'Model "new" Version: 1.0 registered with 1 initial workers'
    assert register(client, "new2.mar") == 'Model "new" Version: 2.0 registered with 1 initial workers'
    message = management_pb2.SetDefaultRequest(model_name="new", model_version="2.0")
    assert client.manage("SetDefault", message) == 'Default version successfully updated for model "new" to "2.0"'
    scale = management_pb2.ScaleWorkerRequest(model_name="new", model_version="2.0", min_worker=2, synchronous=True)
    assert client.manage("ScaleWorker", scale) == "Workers scaled to 2 for model: new, version: 2.0"
    scale = management_pb2.ScaleWorkerRequest(model_name="new", min_worker=1)
    assert client.manage("ScaleWorker", scale) == "Processing worker updates..."
    assert client.predict("new", b"x", model_version="1.0") == b"x"
    described = json.loads(client.manage("DescribeModel", management_pb2.DescribeModelRequest(model_name="new")))
    assert [each["modelVersion"] for each in described] == ["2.0"]
    everything = management_pb2.DescribeModelRequest(model_name="new", model_version="all", customized=True)
    assert len(json.loads(client.manage("DescribeModel", everything))) == 2
    unregister = management_pb2.UnregisterModelRequest(model_name="new", model_version="2.0")
    refused = failure(lambda: client.manage("UnregisterModel", unregister))
    assert refused[0] == grpc.StatusCode.FAILED_PRECONDITION
    assert refused[1].endswith("InvalidModelVersionException")
    twice = failure(lambda: register(client, "new.mar"))
    assert twice[0] == grpc.StatusCode.ALREADY_EXISTS
    for version in ("1.0", "2.0"):
        unregister.model_version = version
        assert client.manage("UnregisterModel", unregister) == 'Model "new" unregistered'
    line = f'"gRPC {MANAGEMENT}/RegisterModel HTTP/2.0" 6 '
    eventually(lambda: line in server.log("access_log.log"), within=10, what="the refused call in the access log")


def test_lists_and_descriptions_are_those_of_rest(server: ServerProcess, client: GrpcClient) -> None:
    listed = client.manage("ListModels", management_pb2.ListModelsRequest(limit=2, next_page_token=1))
    rest = server.request("management", "GET", "/models?limit=2&next_page_token=1").text
    assert listed == rest.rstrip("\n")
    assert len(json.loads(listed)["models"]) == 2
    everything = client.manage("ListModels", management_pb2.ListModelsRequest())
    assert len(json.loads(everything)["models"]) > 2


def test_a_description_in_the_handlers_words(client: GrpcClient) -> None:
    message = management_pb2.DescribeModelRequest(model_name="described", customized=True)
    (description,) = json.loads(client.manage("DescribeModel", message))
    assert description["customizedMetadata"] == {"says": "hello"}
    message.model_name = "nope"
    assert failure(lambda: client.manage("DescribeModel", message))[0] == grpc.StatusCode.INTERNAL
    message.model_name = "idle"
    code, text = failure(lambda: client.manage("DescribeModel", message))
    assert (code, text.partition(". Please")[0]) == (
        grpc.StatusCode.INTERNAL,
        'Model "idle" has no worker to serve describe request',
    )


@pytest.mark.parametrize(
    ("method", "message", "code", "text"),
    [
        (
            "DescribeModel",
            management_pb2.DescribeModelRequest(model_name="nope"),
            grpc.StatusCode.NOT_FOUND,
            "Model not found: nope\norg.pytorch.serve.archive.model.ModelNotFoundException",
        ),
        (
            "DescribeModel",
            management_pb2.DescribeModelRequest(model_name="seen", model_version="7"),
            grpc.StatusCode.NOT_FOUND,
            "Model version: 7 does not exist for model: seen\n"
            "org.pytorch.serve.archive.model.ModelVersionNotFoundException",
        ),
        (
            "RegisterModel",
            management_pb2.RegisterModelRequest(),
            grpc.StatusCode.INVALID_ARGUMENT,
            "Parameter url is required.\norg.pytorch.serve.http.BadRequestException",
        ),
        (
            "RegisterModel",
            management_pb2.RegisterModelRequest(url="nope.mar"),
            grpc.StatusCode.NOT_FOUND,
            "Model not found at: nope.mar\norg.pytorch.serve.archive.model.ModelNotFoundException",
        ),
        (
            "ScaleWorker",
            management_pb2.ScaleWorkerRequest(model_name="seen", min_worker=3, max_worker=2),
            grpc.StatusCode.INVALID_ARGUMENT,
            "max_worker cannot be less than min_worker.\norg.pytorch.serve.http.BadRequestException",
        ),
        (
            "ScaleWorker",
            management_pb2.ScaleWorkerRequest(model_name="nope"),
            grpc.StatusCode.NOT_FOUND,
            "Model not found: nope\norg.pytorch.serve.archive.model.ModelNotFoundException",
        ),
        (
            "SetDefault",
            management_pb2.SetDefaultRequest(model_name="seen", model_version="9"),
            grpc.StatusCode.NOT_FOUND,
            "Model version 9 does not exist for model seen\n"
            "org.pytorch.serve.archive.model.ModelVersionNotFoundException",
        ),
        (
            "UnregisterModel",
            management_pb2.UnregisterModelRequest(),
            grpc.StatusCode.INVALID_ARGUMENT,
            "Parameter url is required.\norg.pytorch.serve.http.BadRequestException",
        ),
    ],
)
def test_refused_management_calls(
    client: GrpcClient, method: str, message: Any, code: grpc.StatusCode, text: str
) -> None:
    assert failure(lambda: client.manage(method, message)) == (code, text)


# The process


def test_the_process_is_shown_and_started_again_and_rest_does_not_notice(server: ServerProcess, tmp_path: Path) -> None:
    state = server.control.call("status")
    assert state["addresses"]["gRPC inference"] == f"grpc://127.0.0.1:{server.ports['grpc_inference']}"
    (process,) = server.processes("grpc-server")
    shown = {each["role"]: each for each in state["processes"]}
    assert shown["gRPC server"]["pid"] == process.pid
    errors: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            status = server.predict("echo", b"x").status
            if status != 200:
                errors.append(str(status))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with GrpcClient(server) as client:
            call, gate = held(client, tmp_path)
            streamed = client.stream("steps")
            next(streamed)
            process.kill()
            assert call.exception().code() == grpc.StatusCode.UNAVAILABLE
            gate.touch()
            assert failure(lambda: list(streamed))[0] == grpc.StatusCode.UNAVAILABLE
            eventually(lambda: answers_again(client), within=10, what="the gRPC server again")
    finally:
        over.set()
        asking.join()
    assert errors == []
    (again,) = server.processes("grpc-server")
    assert again.pid != process.pid
    # The stream of the dead one ends, and then its segment goes.
    eventually(
        lambda: not any(each["retired"] for each in server.control.call("status")["segments"]),
        within=30,
        what="end of the dead one's segment",
    )


def test_a_batcher_that_dies_answers_or_runs_what_it_had(
    server: ServerProcess, client: GrpcClient, tmp_path: Path
) -> None:
    running, gate = held(client, tmp_path)
    waiting = client.inference.Predictions.future(request("seen"), timeout=120)
    faults.kill(server, "batcher")
    error = running.exception()
    gate.touch()
    assert (error.code(), error.details().split("\n")[0]) == (grpc.StatusCode.INTERNAL, "Worker died.")
    assert json.loads(waiting.result().prediction)["batch"] == 1


@pytest.mark.slow
def test_a_stop_lets_calls_under_way_end(tmp_path: Path) -> None:
    archive(tmp_path, "seen", SEEN)
    with ServerProcess(store=tmp_path) as stopping, GrpcClient(stopping) as client:
        stopping.register("seen.mar")
        client.predict("seen")
        call, gate = held(client, tmp_path)
        with ThreadPoolExecutor(1) as pool:
            stop = pool.submit(stopping.stop)
            eventually(
                lambda: "Stopping: requests under way" in stopping.log(), within=20, what="the begin of the stop"
            )
            assert not call.done()
            gate.touch()
            assert json.loads(call.result().prediction)["batch"] == 1
            assert stop.result() == []
        assert failure(client.ping)[0] == grpc.StatusCode.UNAVAILABLE
        # The same instance again on the same ports, at once.
        stopping.start()
        with GrpcClient(stopping) as other:
            assert "ealthy" in other.ping()


def test_a_stop_ends_streams_at_its_limit(tmp_path: Path) -> None:
    archive(tmp_path, "steps", STEPS, config_yaml="continuousBatching: true\nbatchSize: 4")
    with ServerProcess(store=tmp_path, config={"graceful_timeout": "1"}) as stopping, GrpcClient(stopping) as client:
        stopping.register("steps.mar")
        stream = client.stream("steps")  # has no end of its own
        assert next(stream).prediction == b"step "
        assert stopping.stop() == []
        assert failure(lambda: list(stream))[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


def test_a_port_that_is_taken_ends_the_start(tmp_path: Path) -> None:
    server = ServerProcess(store=tmp_path)
    port = server.ports["grpc_management"]
    text = f"Failed to bind to address: grpc://127.0.0.1:{port} (grpc_management_port): Address already in use"
    ended = pytest.raises(RuntimeError, match="the server ended with 1")
    with socket.create_server(("127.0.0.1", port)), ended as seen, server:
        pass
    assert text in str(seen.value)


def test_the_ports_of_a_running_server_are_its_own(server: ServerProcess) -> None:
    """Also for others that would share them."""
    port = server.ports["grpc_inference"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            sock.bind(("127.0.0.1", port))
    refused = pytest.raises(RuntimeError, match=r"grpc_inference_port\): Address already in use")
    with refused, ServerProcess(config={"grpc_inference_port": str(port)}):
        pass


@pytest.mark.slow
def test_a_process_that_hangs_is_started_again(server: ServerProcess) -> None:
    (process,) = server.processes("grpc-server")
    process.kill(signal.SIGSTOP)
    eventually(lambda: not process.alive, within=30, what="end of the process that hangs")
    with GrpcClient(server) as client:
        eventually(lambda: answers_again(client), within=20, what="the gRPC server again")


# The page of the documentation


def test_the_commands_of_the_page(server: ServerProcess, tmp_path: Path) -> None:
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```\n", (REPOSITORY / "docs" / "grpc.md").read_text())
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
    }

    def typed(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    ran = 0
    for number, (language, printed_text) in enumerate(blocks):
        text = printed_text.replace("127.0.0.1:7070", f"127.0.0.1:{server.ports['grpc_inference']}")
        text = text.replace("127.0.0.1:7071", f"127.0.0.1:{server.ports['grpc_management']}")
        if language == "bash":
            typed(["bash", "-euc", text])
        elif language == "python":
            printed = [line.rstrip() for line in typed([sys.executable, "-c", text]).splitlines()]
            assert printed == blocks[number + 1][1].splitlines()
            ran += 1
    assert ran == 3


# Tokens and TLS


def test_tokens(tmp_path: Path) -> None:
    archive(tmp_path, "echo", ECHO)
    text = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
    refused = (grpc.StatusCode.PERMISSION_DENIED, text)
    with ServerProcess(store=tmp_path, config={"disable_token_authorization": "false"}) as guarded:
        keys = json.loads((guarded.home / "key_file.json").read_text())
        inference = (("authorization", f"Bearer {keys['inference']['key']}"),)
        management = (("authorization", f"Bearer {keys['management']['key']}"),)
        with GrpcClient(guarded, metadata=management) as client:
            message = management_pb2.RegisterModelRequest(url="echo.mar", initial_workers=1, synchronous=True)
            assert "registered" in client.manage("RegisterModel", message)
            assert failure(client.ping) == refused
        with GrpcClient(guarded, metadata=inference) as client:
            assert client.ping()
            assert client.predict("echo", b"x") == b"x"
            assert [each.prediction for each in client.stream("echo", b"y")] == [b"y"]
            assert failure(lambda: client.manage("ListModels", management_pb2.ListModelsRequest())) == refused
        with GrpcClient(guarded) as client:
            assert failure(client.ping) == refused
            assert failure(lambda: client.predict("echo")) == refused
            assert failure(lambda: list(client.stream("echo"))) == refused
            asked = [inference_pb2.PredictionsRequest(model_name="echo", sequence_id="s")]
            assert failure(lambda: list(client.inference.StreamPredictions2(iter(asked)))) == refused


def test_tls_and_no_model_control(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    authority = Authority(folder)
    archive(tmp_path, "echo", ECHO)
    config = {"enable_grpc_ssl": "true", "enable_model_api": "false", **authority.pem()}
    with ServerProcess(store=tmp_path, config=config, arguments=["--models", "echo.mar"]) as secured:
        assert secured.control.call("status")["addresses"]["gRPC inference"].startswith("grpcs://")
        with GrpcClient(secured, (folder / "ca.pem").read_bytes()) as client:
            data = b"x" * 1_000_000
            assert client.predict("echo", data) == data
            code, text = failure(lambda: register(client, "echo.mar"))
            assert (code, text.split("\n")[0]) == (grpc.StatusCode.PERMISSION_DENIED, "Model API disabled")
            message = management_pb2.UnregisterModelRequest(model_name="echo")
            assert failure(lambda: client.manage("UnregisterModel", message))[0] == grpc.StatusCode.PERMISSION_DENIED
        with GrpcClient(secured) as plain:
            assert failure(plain.ping)[0] == grpc.StatusCode.UNAVAILABLE


def test_a_connection_ends_at_its_age(tmp_path: Path) -> None:
    # The grace is for the last call: whatever holds the server up, it is answered within that.
    config = {"grpc_inference_max_connection_age_ms": "300", "grpc_inference_max_connection_age_grace_ms": "8000"}
    archive(tmp_path, "steps", STEPS, config_yaml="continuousBatching: true\nbatchSize: 4")
    with ServerProcess(store=tmp_path, config=config) as server, GrpcClient(server) as client:
        server.register("steps.mar")
        # The stream has no end of its own; new calls get a new connection.
        assert failure(lambda: list(client.stream("steps", timeout=120)))[0] == grpc.StatusCode.UNAVAILABLE
        assert client.ping()
