"""Workflows beyond the REST API: at the start, in snapshots, under other protocols' names, and who may register."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient, failure, open_inference_pb2
from support.http import Reply
from support.server import ServerProcess
from support.wars import NAMED, war

CHAIN = """
models:
  m1: {url: named.mar}
dag:
  before: [m1]
  m1: [after]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    archive(folder, "named", NAMED)
    war(folder, "chain", CHAIN)
    return folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[ServerProcess]:
    config = {"ts_open_inference_protocol": "true"}
    arguments = ["--workflows", "chain.war", "second=chain.war", "gone.war"]
    with ServerProcess(store=store, config=config, arguments=arguments, snapshots=True) as running:
        yield running


def ask(server: ServerProcess, workflow: str, body: bytes = b"x") -> Reply:
    return server.request("inference", "POST", f"/wfpredict/{workflow}", body=body)


def names(server: ServerProcess) -> list[str]:
    listed = server.request("management", "GET", "/workflows").json()["workflows"]
    return [each["workflowName"] for each in listed]


def test_workflows_of_the_start(server: ServerProcess) -> None:
    assert names(server) == ["chain", "second"]
    assert ask(server, "second").text == "x before second__m1 after"
    assert "Failed to load workflow: gone.war: Workflow not found in workflow store: gone.war" in server.log()


def test_a_workflow_answers_over_grpc(server: ServerProcess) -> None:
    with GrpcClient(server) as client:
        assert client.predict("chain", b"x") == b"x before chain__m1 after"
        assert b"".join(part.prediction for part in client.stream("chain", b"y")) == b"y before chain__m1 after"


def test_a_node_that_fails_is_told_of_over_grpc(server: ServerProcess) -> None:
    functions = "def look(data, context):\n    if data is not None:\n        raise ValueError('no')\n"
    war(server.store, "failing", "models: {retry-attempts: 0}\ndag:\n  look: []\n", functions)
    assert server.request("management", "POST", "/workflows?url=failing.war", timeout=60).status == 200
    with GrpcClient(server) as client:
        code, text = failure(lambda: client.predict("failing", b"x"))
    assert code == grpc.StatusCode.INTERNAL
    assert text.startswith("Error executing look")
    assert server.request("management", "DELETE", "/workflows/failing", timeout=60).status == 200


def test_a_workflow_answers_over_kserve(server: ServerProcess) -> None:
    reply = server.request("inference", "POST", "/v1/models/chain:predict", body=b"x")
    assert (reply.status, reply.text) == (200, "x before chain__m1 after")
    reply = server.request("inference", "POST", "/v2/models/chain/infer", body=b"x")
    assert (reply.status, reply.text) == (200, "x before chain__m1 after")
    assert server.request("inference", "GET", "/v2/models/chain/ready").json() == {"name": "chain", "ready": True}
    assert server.request("management", "GET", "/v1/models/chain").json() == {"name": "chain", "ready": True}
    assert server.request("management", "GET", "/v1/models/nope").status == 404
    assert server.predict("chain", b"x").status == 404, "the path of models is for models"


def test_a_supervisor_that_dies_takes_no_workflow_along(server: ServerProcess) -> None:
    faults.kill(server, "supervisor")

    def is_back() -> bool:
        try:
            return [ask(server, name).status for name in ("chain", "second")] == [200, 200]
        except OSError:
            return False

    eventually(is_back, within=20, what="the workflows again")
    server.note_prefix()


def test_a_restart_brings_them_back_from_the_snapshot(server: ServerProcess) -> None:
    reply = server.request("management", "POST", "/workflows?url=chain.war&workflow_name=third&response_timeout=9")
    assert reply.status == 200
    folder = server.home / "logs" / "config"
    before = len(list(folder.iterdir()))
    for change in ("min_worker=2&max_worker=2&synchronous=true", "min_worker=1&max_worker=1"):
        assert server.request("management", "PUT", f"/models/third__m1?{change}").status in (200, 202)
    assert server.request("management", "PUT", "/models/third__m1/1.0/set-default").status == 200
    assert len(list(folder.iterdir())) == before, "nodes are in no snapshot"
    assert server.request("management", "DELETE", "/workflows/second", timeout=60).status == 200
    assert len(list(folder.iterdir())) == before + 1, "one of the workflow, and none of its nodes"
    [newest] = sorted(folder.iterdir())[-1:]
    assert "chain__" not in newest.read_text(), "nodes are no models of their own"
    server.stop()
    server.ts_config = None
    server.start()
    assert names(server) == ["chain", "third"]
    assert ask(server, "third").text == "x before third__m1 after"
    [node] = server.request("management", "GET", "/models/third__m1").json()
    assert node["responseTimeout"] == 9


def test_tokens_and_a_switch(store: Path) -> None:
    config = {"disable_token_authorization": "false", "workflow_registration": "false", "load_workflows": "all"}
    with ServerProcess(store=store, config=config, combined=True) as server:
        keys = json.loads((server.home / "key_file.json").read_text())

        def call(method: str, path: str, key: str) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {keys[key]['key']}"} if key else {}
            reply = server.request("inference", method, path, body=b"x", headers=headers)
            return reply.status, reply.text

        for path in ("/wfpredict/chain", "/WFPREDICT/chain"):
            assert call("POST", path, "inference") == (200, "x before chain__m1 after")
            assert call("POST", path, "management")[0] == 400
        assert call("GET", "/workflows", "inference")[0] == 400
        assert call("GET", "/workflows", "management")[0] == 200
        status, text = call("POST", "/workflows?url=chain.war&workflow_name=w", "management")
        assert (status, json.loads(text)["message"]) == (400, "Registering new workflows is disabled.")


def test_allowed_urls(store: Path) -> None:
    with ServerProcess(store=store, config={"allowed_urls": "http://good/.*"}) as server:
        url = "http://bad/x.war"
        reply = server.request("management", "POST", f"/workflows?url={url}")
        message = f"Given URL {url} does not match any allowed URL(s)"
        assert reply.json() == {"code": 404, "type": "WorkflowNotFoundException", "message": message}


def test_an_instance_of_the_open_protocol_over_grpc(server: ServerProcess) -> None:
    with GrpcClient(server) as client:
        ready = client.open_inference.ModelReady(open_inference_pb2.ModelReadyRequest(name="chain"))
        assert ready.ready
