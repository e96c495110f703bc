"""Workflows beyond the REST API: at the start, in snapshots, under other protocols' names, and who may register."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient, failure, open_inference_pb2
from support.http import Reply
from support.server import ServerProcess
from support.wars import NAMED, war

from wsgi_ts.settings.properties import parse_properties

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
    told = "Failed to load workflow: gone.war: Workflow not found in workflow store: gone.war"
    eventually(lambda: told in server.log(), within=20)


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
        except (OSError, http.client.HTTPException):
            return False

    eventually(is_back, within=60, what="the workflows again")
    server.note_prefix()


def test_a_restart_brings_them_back_from_the_snapshot(server: ServerProcess) -> None:
    reply = server.request("management", "POST", "/workflows?url=chain.war&workflow_name=third&response_timeout=9")
    assert reply.status == 200
    folder = server.home / "logs" / "config"
    before = len(list(folder.iterdir()))
    assert server.request("management", "PUT", "/models/third__m1/1.0/set-default").status == 200
    assert len(list(folder.iterdir())) == before, "nothing that a snapshot has was changed"
    for node in ("m1", "after"):
        reply = server.request("management", "PUT", f"/models/third__{node}?min_worker=2&max_worker=3&synchronous=true")
        assert reply.status == 200
    assert len(list(folder.iterdir())) == before + 2, "the workflow's record has how its nodes were scaled"
    assert server.request("management", "DELETE", "/workflows/second", timeout=60).status == 200
    assert len(list(folder.iterdir())) == before + 3, "one of the workflow, and none of its nodes"
    [newest] = sorted(folder.iterdir())[-1:]
    assert "chain__" not in newest.read_text(), "nodes are no models of their own"
    server.stop()
    server.ts_config = None
    server.start()
    assert names(server) == ["chain", "third"]
    assert ask(server, "third").text == "x before third__m1 after"
    for name in ("third__m1", "third__before"):
        [node] = server.request("management", "GET", f"/models/{name}").json()
        assert (node["responseTimeout"], node["minWorkers"], node["maxWorkers"]) == (9, 2, 3)
        assert len(node["workers"]) == 2
    [node] = server.request("management", "GET", "/models/chain__m1").json()
    assert (node["minWorkers"], node["maxWorkers"]) == (1, 1), "it was never scaled"


def snapshot(server: ServerProcess) -> dict[str, Any]:
    [newest] = sorted((server.home / "logs" / "config").iterdir())[-1:]
    [row] = [row for row in parse_properties(newest.read_bytes()) if row.key == "model_snapshot"]
    workflows: dict[str, Any] = json.loads(row.value).get("workflows", {})
    return workflows


def restart(server: ServerProcess) -> None:
    server.stop()
    server.ts_config = None
    server.start()


def test_a_workflow_that_fails_at_a_start_stays_in_the_snapshots(store: Path) -> None:
    def manage(method: str, path: str) -> Reply:
        return server.request("management", method, path, body=b"", timeout=60)

    with ServerProcess(store=store, snapshots=True) as server:
        for name in ("flaky", "other"):
            assert manage("POST", f"/workflows?url=chain.war&workflow_name={name}&response_timeout=7").status == 200
        (server.store / "chain.war").rename(server.store / "away.war")
        restart(server)
        told = [line.rpartition(" - ")[2] for line in server.log().splitlines() if "Failed to load" in line]
        text = "Failed to load workflow: %s: Workflow not found in workflow store: chain.war"
        assert told == [text % "flaky", text % "other"]
        assert names(server) == []
        assert snapshot(server)["flaky"]["responseTimeout"] == 7
        assert manage("GET", "/workflows/flaky").status == 404
        assert manage("DELETE", "/workflows/other").json() == {"status": 'Workflow "other" unregistered'}
        assert list(snapshot(server)) == ["flaky"]
        assert manage("DELETE", "/workflows/other").status == 404
        (server.store / "away.war").rename(server.store / "chain.war")
        restart(server)
        assert names(server) == ["flaky"]
        assert ask(server, "flaky").text == "x before flaky__m1 after"


def test_a_workflow_is_as_ready_everywhere(server: ServerProcess) -> None:
    """It is ready when no request of it would fail for lack of a worker, whoever asks."""

    def told() -> set[bool]:
        found = {
            server.request("inference", "GET", path).json()["ready"]
            for path in ("/v2/models/torn/ready", "/v1/models/torn")
        }
        found.add(server.request("inference", "GET", "/v2/models/torn/ready").status == 200)
        found.add(server.request("management", "GET", "/v1/models/torn").json()["ready"])
        with GrpcClient(server) as client:
            asked = open_inference_pb2.ModelReadyRequest(name="torn")
            found.add(client.open_inference.ModelReady(asked).ready)
        found |= {row["ready"] for row in server.control.call("status")["workflows"] if row["workflow"] == "torn"}
        return found

    def scale(model: str, workers: int) -> None:
        path = f"/models/{model}?min_worker={workers}&max_worker={workers}&synchronous=true"
        assert server.request("management", "PUT", path, timeout=60).status == 200

    server.register("named.mar", model_name="shared")
    options = "options: {nodes: {theirs: {model: shared}, extra: {optional: true}}}\n"
    text = "models: {m: {url: named.mar}, extra: {url: gone.mar}}\ndag: {before: [m, theirs, extra]}\n" + options
    war(server.store, "torn", text)
    assert server.request("management", "POST", "/workflows?url=torn.war", timeout=60).status == 200
    eventually(lambda: told() == {True}, within=20, what="ready: what is optional does not count")
    for model in ("torn__m", "torn__before", "shared"):
        scale(model, 0)
        eventually(lambda: told() == {False}, within=20, what=f"not ready without {model}")
        scale(model, 1)
        eventually(lambda: told() == {True}, within=20, what="ready again")
    assert server.request("management", "DELETE", "/workflows/torn", timeout=60).status == 200
    assert server.request("management", "DELETE", "/models/shared", timeout=60).status == 200


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


def test_models_that_were_fetched_for_a_workflow_are_there_again(store: Path, tmp_path: Path) -> None:
    """After the end of a supervisor, and after a restart; they go with the workflow, as before."""
    archive(tmp_path, "far", NAMED)
    with ServerProcess(snapshots=True) as server:
        war(server.store, "w", f"models: {{m: {{url: 'file://{tmp_path}/far.mar'}}}}\ndag: {{before: [m]}}\n")
        assert server.request("management", "POST", "/workflows?url=w.war", timeout=60).status == 200

        def answers() -> bool:
            try:
                return ask(server, "w").text == "x before w__m"
            except (OSError, http.client.HTTPException):
                return False

        assert answers()
        (tmp_path / "far.mar").unlink()
        faults.kill(server, "supervisor")
        eventually(answers, within=30, what="the workflow again")
        server.note_prefix()
        restart(server)
        eventually(answers, within=20, what="the workflow after a restart")
        [node] = server.request("management", "GET", "/models/w__m").json()
        assert node["modelUrl"] == f"file://{tmp_path}/far.mar"
        assert (server.store / "far.mar").exists()
        assert server.request("management", "DELETE", "/workflows/w", timeout=60).status == 200
        assert not (server.store / "far.mar").exists()
