"""The open inference protocol's model repository, on the management API."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.archives import archive
from support.grpc_client import GrpcClient, open_inference_pb2
from support.http import Reply
from support.server import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Predictions and management at one address, as clients of the protocol expect."""
    store = tmp_path_factory.mktemp("store")
    for name in ("one", "two"):
        archive(store, name)
    archive(store, "broken", "raise RuntimeError('never')")
    archive(store, "one", version="2.0", file_name="one-next.mar")
    config = {"ts_open_inference_protocol": "true"}
    with ServerProcess(store=store, config=config, combined=True) as running:
        yield running


def ask(server: ServerProcess, path: str, body: Any = None) -> Reply:
    text = "" if body is None else json.dumps(body)
    headers = {"content-type": "application/json"}
    return server.request("management", "POST", f"/v2/repository/{path}", body=text, headers=headers, timeout=60)


def states(server: ServerProcess, **body: Any) -> dict[tuple[str, str], str]:
    reply = ask(server, "index", body)
    assert reply.status == 200, reply.text
    return {(row["name"], row["version"]): row["state"] for row in reply.json()}


def test_load_index_and_unload(server: ServerProcess) -> None:
    assert states(server) == dict.fromkeys([(name, "") for name in ("broken", "one", "one-next", "two")], "UNAVAILABLE")
    reply = ask(server, "models/one/load", {"parameters": {"initial_workers": 2, "batch_size": 4}})
    assert (reply.status, reply.json()) == (200, {"name": "one", "load": True})
    assert server.predict("one", b"1").body == b"1"
    described = server.request("management", "GET", "/models/one").json()[0]
    assert (described["batchSize"], len(described["workers"])) == (4, 2)
    assert ask(server, "models/one/load").status == 200, "it is loaded already"
    assert states(server, ready=True) == {("one", "1.0"): "READY"}
    assert server.register("one-next.mar", model_name="one").status == 200
    assert states(server, ready=True) == {("one", "1.0"): "READY", ("one", "2.0"): "READY"}
    reply = ask(server, "models/one/unload")
    assert (reply.status, reply.json()) == (200, {"name": "one", "unload": True})
    assert server.predict("one").status == 404
    assert states(server, ready=True) == {}


def test_the_same_over_grpc(server: ServerProcess) -> None:
    with GrpcClient(server) as client:
        repository = client.repository

        def states(**fields: Any) -> dict[tuple[str, str], str]:
            index = repository.RepositoryIndex(open_inference_pb2.RepositoryIndexRequest(**fields), timeout=30)
            return {(row.name, row.version): row.state for row in index.models}

        assert states()["two", ""] == "UNAVAILABLE"
        load = open_inference_pb2.RepositoryModelLoadRequest(model_name="two")
        load.parameters["initial_workers"].int64_param = 2
        load.parameters["max_batch_delay"].string_param = "7"
        answer = repository.RepositoryModelLoad(load, timeout=60)
        assert (answer.model_name, answer.isLoaded) == ("two", True)
        described = server.request("management", "GET", "/models/two").json()[0]
        assert (described["maxBatchDelay"], len(described["workers"])) == (7, 2)
        assert states(ready=True) == {("two", "1.0"): "READY"}
        # As KServe's clients word it, whose only field is the first.
        unload = open_inference_pb2.RepositoryModelUnloadRequest(repository_name="two")
        assert repository.RepositoryModelUnload(unload, timeout=60).isUnloaded
        assert states(ready=True) == {}
        for fields, code in (
            ({"model_name": "none"}, grpc.StatusCode.NOT_FOUND),
            ({}, grpc.StatusCode.INVALID_ARGUMENT),
            ({"model_name": "two", "parameters": {"url": {"string_param": "x"}}}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                repository.RepositoryModelLoad(open_inference_pb2.RepositoryModelLoadRequest(**fields), timeout=30)
            assert caught.value.code() == code
        with pytest.raises(grpc.RpcError) as caught:
            client.open_inference.RepositoryIndex(open_inference_pb2.RepositoryIndexRequest(), timeout=30)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, "it is on the port of the management API"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("models/none/load", None, 404),
        ("models/none/unload", None, 404),
        ("models/two/load", {"parameters": {"url": "http://host/x.mar"}}, 400),
        ("models/two/load", {"parameters": {"batch_size": "many"}}, 400),
        ("models/two/load", {"parameters": 1}, 400),
        ("models/two/load", [1], 400),
        ("models/broken/load", None, 500),
    ],
)
def test_what_cannot_be(server: ServerProcess, path: str, body: Any, status: int) -> None:
    reply = ask(server, path, body)
    assert reply.status == status, reply.text
    assert reply.json()["code"] == status
    assert ("two", "") in states(server)


def test_it_takes_the_management_token_and_the_model_api(store: Path, start_server: Any) -> None:
    archive(store, "one")
    config = {"ts_open_inference_protocol": "true", "disable_token_authorization": "false", "enable_model_api": "false"}
    server: ServerProcess = start_server(store=store, config=config, combined=True)
    keys = json.loads((server.home / "key_file.json").read_text())

    def status(path: str, key: str) -> int:
        headers = {"authorization": f"Bearer {keys[key]['key']}"}
        reply = server.request("inference", "POST", f"/v2/repository/{path}", body=b"", headers=headers)
        return reply.status

    assert status("index", "inference") == 400
    assert status("index", "management") == 200
    assert status("models/one/load", "inference") == 400
    assert status("models/one/load", "management") == 405
    assert os.listdir(server.store) == ["one.mar"]
    for key, code in (("inference", grpc.StatusCode.PERMISSION_DENIED), ("management", grpc.StatusCode.OK)):
        metadata = [("authorization", f"Bearer {keys[key]['key']}")]
        with GrpcClient(server) as client:
            call = client.repository.RepositoryIndex.with_call
            if code == grpc.StatusCode.OK:
                assert (
                    call(open_inference_pb2.RepositoryIndexRequest(), metadata=metadata, timeout=30)[1].code() == code
                )
                load = open_inference_pb2.RepositoryModelLoadRequest(model_name="one")
                with pytest.raises(grpc.RpcError) as caught:
                    client.repository.RepositoryModelLoad(load, metadata=metadata, timeout=30)
                assert caught.value.details().startswith("Model API disabled")
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    call(open_inference_pb2.RepositoryIndexRequest(), metadata=metadata, timeout=30)
                assert caught.value.code() == code
