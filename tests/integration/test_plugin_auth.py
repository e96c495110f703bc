"""The example with JSON web tokens in a real server: every API, before the body is read; what fails lets nobody in."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import grpc
import jwt
import pytest
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient, inference_pb2, management_pb2, open_inference_pb2
from support.http import RawConnection

from wsgi_ts.plugins.testing import PluginServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
SECRET = "a secret that is long enough for HS256"
CONFIG = {"web_workers": "2", "ts_open_inference_protocol": "true", "enable_model_api": "true"}
WAITS = """
import os, time
from wsgi_ts.plugins import Principal, plugin

@plugin("auth", name="waits")
class Waits:
    cache_s = 0.0
    timeout_s = 8.0  # longer than a busy machine lets a decision wait

    def authenticate(self, head):
        if os.path.exists("hang"):
            time.sleep(60)
        if os.path.exists("raise"):
            raise RuntimeError("no directory")
        return Principal("anybody")

    def authorize(self, principal, action, model):
        return action != "other"
"""


def token(models: tuple[str, ...] = ("*",), actions: tuple[str, ...] = ("*",), **claims: Any) -> dict[str, str]:
    said = {"sub": "tester", "exp": time.time() + 600, "models": models, "actions": actions} | claims
    return {"authorization": f"Bearer {jwt.encode(said, SECRET, 'HS256')}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginServer]:
    home = tmp_path_factory.mktemp("jwt") / "server"
    environment = {"JWT_SECRET": SECRET}
    server = PluginServer(home, EXAMPLES / "jwt_auth.py", environment=environment, config=CONFIG)
    server.start()
    yield server
    assert server.stop() == 0


def test_predictions(server: PluginServer) -> None:
    path = "/predictions/echo"
    assert server.post(path, b"x", headers=token()).body == b"x"
    assert server.post(path, b"x", headers=token(models=("echo",), actions=("predict",))).status == 200
    nobody = server.post(path, b"x")
    assert (nobody.status, nobody.json()["type"]) == (401, "AuthenticationException")
    assert nobody.headers["www-authenticate"] == "Bearer"
    late = server.post(path, b"x", headers=token(exp=time.time() - 1))
    assert (late.status, late.json()["message"]) == (401, "The token is not accepted: Signature has expired.")
    forged = {"authorization": "Bearer " + jwt.encode({"sub": "a", "exp": 2e9}, "another" * 8, "HS256")}
    assert server.post(path, b"x", headers=forged).status == 401
    other = server.post(path, b"x", headers=token(models=("other",)))
    assert (other.status, other.json()["message"]) == (
        403,
        "tester is not allowed to ask for this: predict of model echo",
    )


def test_management_and_what_is_open(server: PluginServer) -> None:
    reader = token(actions=("describe",))
    assert server.get("/models", api="management").status == 401
    assert server.get("/models/echo", api="management", headers=reader).status == 200
    assert server.request("PUT", "/models/echo?min_worker=1", b"", api="management", headers=reader).status == 403
    assert server.get("/ping").status == 200
    assert server.get("/metrics", api="metrics").status == 200
    assert server.get("/api-description").status == 200


def test_before_the_body_is_read(server: PluginServer) -> None:
    with RawConnection(server.ports["inference"]) as connection:
        connection.send(b"POST /predictions/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5000000\r\n\r\n")
        line, _ = connection.read_head()
        assert b" 401 " in line


def test_many_requests_on_one_connection(server: PluginServer) -> None:
    """Decisions that are known and that are not, with bodies that come at once, late, and with the next request."""
    allowed, refused = token(), token(models=("other",))
    with RawConnection(server.ports["inference"]) as connection:
        for number in range(30):
            fresh = token(number=number)["authorization"] if number % 3 else allowed["authorization"]
            head = (
                f"POST /predictions/echo HTTP/1.1\r\nHost: a\r\nAuthorization: {fresh}\r\nContent-Length: 6000\r\n\r\n"
            )
            body = b"%d" % (number % 10) * 6000
            parts = [head.encode() + body] if number % 2 else [head.encode(), body[:10], body[10:]]
            for part in parts:
                connection.send(part)
            line, headers = connection.read_head()
            assert b" 200 " in line, line
            assert connection.read_exactly(int(headers["content-length"])) == body
        ping = "GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
        ask = f"POST /predictions/echo HTTP/1.1\r\nHost: a\r\nAuthorization: {refused['authorization']}\r\n\r\n"
        connection.send((ping + ask).encode())
        line, headers = connection.read_head()
        assert b" 200 " in line
        connection.read_exactly(int(headers["content-length"]))
        line, _ = connection.read_head()
        assert b" 403 " in line


def test_a_large_body_that_comes_before_the_decision(server: PluginServer) -> None:
    body = bytes(range(256)) * 4000
    for number in range(6):
        assert server.post("/predictions/echo", body, headers=token(number=number)).body == body
    refused = server.post("/predictions/echo", body[:100_000], headers=token(models=()))
    assert refused.status == 403


def test_a_prediction_that_names_no_model_is_for_the_only_one(server: PluginServer) -> None:
    assert server.post("/invocations", b"x", headers=token(models=("echo",), actions=("predict",))).body == b"x"
    assert server.post("/invocations", b"x", headers=token(models=("other",))).status == 403
    assert server.post("/invocations", b"x").status == 401


def test_a_model_that_a_form_names(tmp_path: Path) -> None:
    """It is decided on where the body is there: at once, in pieces, with the next request behind it."""
    keys = tmp_path / "keys.json"
    entry = {"name": "team-a", "models": ["echo"], "actions": ["predict"]}
    keys.write_text(json.dumps({hashlib.sha256(b"s3cret").hexdigest(): entry}))
    server = PluginServer(
        tmp_path / "server",
        EXAMPLES / "api_keys.py",
        environment={"API_KEYS_FILE": str(keys)},
        models=(archive(tmp_path, "other"),),
    )
    server.start(wait_for_model=False)
    key = {"x-api-key": "s3cret"}
    form = {**key, "content-type": "application/x-www-form-urlencoded"}
    try:
        eventually(
            lambda: server.post("/predictions/echo", b"x", headers=key).body == b"x", within=30, what="the model"
        )
        assert server.post("/predictions/other", b"x", headers=key).status == 403
        assert server.post("/invocations?model_name=other", b"x", headers=key).status == 403
        for name, status in (("echo", 200), ("other", 403), ("unknown", 403), ("echo", 200), ("", 404)):
            answer = server.post("/invocations", f"a=1&model_name={name}".encode(), headers=form)
            assert answer.status == status, (name, answer.body)
        assert (
            server.post("/invocations", b"model_name=echo", headers={"content-type": form["content-type"]}).status
            == 401
        )
        for name, code in (("echo", b"200"), ("other", b"403")):
            part = f'--b\r\nContent-Disposition: form-data; name="model_name"\r\n\r\n{name}\r\n'
            data = '--b\r\nContent-Disposition: form-data; name="body"\r\n\r\n' + "x" * 20_000 + "\r\n--b--\r\n"
            body = (part + data).encode()
            head = f"POST /invocations HTTP/1.1\r\nHost: a\r\nX-Api-Key: s3cret\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            ping = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
            for parts in ([head.encode() + body + ping], [head.encode(), body[:10], body[10:] + ping]):
                time.sleep(1.1)  # what was decided is forgotten
                with RawConnection(server.ports["inference"]) as connection:
                    for each in parts:
                        connection.send(each)
                    line, headers = connection.read_head()
                    assert line.split()[1] == code, line
                    connection.read_exactly(int(headers["content-length"]))
                    if code == b"200":
                        assert connection.read_head()[0].split()[1] == b"200"
    finally:
        assert server.stop() == 0


def test_grpc(server: PluginServer) -> None:
    request = inference_pb2.PredictionsRequest(model_name="echo", input={"body": b"x"})

    def code(call: Any, message: Any, headers: dict[str, str]) -> grpc.StatusCode:
        try:
            call(message, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            found: grpc.StatusCode = error.code()
            return found
        return grpc.StatusCode.OK

    codes = grpc.StatusCode
    with GrpcClient(server) as client:  # type: ignore[arg-type]
        predict, describe = client.inference.Predictions, client.management.DescribeModel
        assert code(predict, request, token()) == codes.OK
        assert code(predict, request, {}) == codes.UNAUTHENTICATED
        assert code(predict, request, token(models=("other",))) == codes.PERMISSION_DENIED
        model = management_pb2.DescribeModelRequest(model_name="echo")
        assert code(describe, model, token(actions=("describe",))) == codes.OK
        assert code(describe, model, token(actions=("predict",))) == codes.PERMISSION_DENIED
        stream = client.inference.StreamPredictions2(
            iter([inference_pb2.PredictionsRequest(model_name="echo", input={"body": b"x"}, sequence_id="s")]),
            metadata=tuple(token(models=("other",)).items()),
        )
        with pytest.raises(grpc.RpcError) as refused:
            list(stream)
        assert refused.value.code() == codes.PERMISSION_DENIED


def test_the_repository_over_grpc_is_no_prediction(server: PluginServer) -> None:
    """Who may ask a model may not load or unload it, however the request names it."""
    codes = grpc.StatusCode

    def code(name: str, headers: dict[str, str], **fields: str) -> grpc.StatusCode:
        message = getattr(open_inference_pb2, f"{name}Request")(**fields)
        try:
            getattr(client.repository, name)(message, metadata=tuple(headers.items()), timeout=60)
        except grpc.RpcError as error:
            found: grpc.StatusCode = error.code()
            return found
        return codes.OK

    with GrpcClient(server) as client:  # type: ignore[arg-type]
        predicts, registers = token(actions=("predict", "describe")), token(actions=("register", "unregister"))
        for field in ("model_name", "repository_name"):
            assert code("RepositoryModelUnload", predicts, **{field: "echo"}) == codes.PERMISSION_DENIED
            assert code("RepositoryModelLoad", predicts, **{field: "echo"}) == codes.PERMISSION_DENIED
            others = token(models=("other",), actions=("register", "unregister"))
            assert code("RepositoryModelUnload", others, **{field: "echo"}) == codes.PERMISSION_DENIED
            assert code("RepositoryModelLoad", registers, **{field: "echo"}) == codes.OK, "it is loaded already"
        assert code("RepositoryIndex", predicts) == codes.OK
        assert code("RepositoryIndex", registers) == codes.PERMISSION_DENIED
    assert server.post("/predictions/echo", b"x", headers=token()).body == b"x"


def test_one_that_hangs_or_raises_lets_nobody_in_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(dedent(WAITS))
    server = PluginServer(tmp_path / "server", tmp_path / "waits.py")
    server.start()
    try:
        assert server.post("/predictions/echo", b"x").body == b"x"
        assert server.get("/nothing").status == 403
        (server.home / "hang").touch()
        answer = server.post("/predictions/echo", b"x")
        assert answer.status == 503 and "Who may ask" in answer.json()["message"]
        os.rename(server.home / "hang", server.home / "raise")
        assert server.post("/predictions/echo", b"x").status == 503
        (server.home / "raise").unlink()
        assert server.post("/predictions/echo", b"x").body == b"x"
        assert server.output.count("no decision within 8 s") == 1
    finally:
        assert server.stop() == 0


def test_without_its_secret_the_server_answers_nobody(tmp_path: Path) -> None:
    server = PluginServer(tmp_path / "server", EXAMPLES / "jwt_auth.py", environment={"JWT_SECRET": ""})
    del server._environment["JWT_SECRET"]
    server.start(wait_for_model=False)
    try:
        assert server.post("/predictions/echo", b"x", headers=token()).status == 503
        eventually(lambda: "KeyError: 'JWT_SECRET'" in server.output, within=20)
    finally:
        server.stop()
