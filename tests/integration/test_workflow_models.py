"""The models of workflows: behind envelopes, with full queues, and with archives that the model store has already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.archives import archive
from support.eventually import eventually
from support.grpc_client import GrpcClient, failure, open_inference_pb2
from support.http import Reply
from support.server import ServerProcess
from support.slots import slots_in_use
from support.wars import NAMED, war

#: Says what it was handed over.
ROWS = """
def handle(data, context):
    if data is None:
        return None
    rows = [row["data"] if isinstance(row, dict) and "datatype" in row else row for row in data]
    return [row.decode() if isinstance(row, bytearray) else row for row in rows]
"""
#: They see what the client has sent and what the model has answered, as it is.
FUNCTIONS = """
import json

def before(data, context):
    return None if data is None else [json.dumps(data[0]["body"])]

def after(data, context):
    return None if data is None else [{"seen": json.loads(data[0]["body"])}]
"""
PASSING = """
def before(data, context):
    return None if data is None else [data[0].get("body") or data[0]["data"]]
"""
#: Runs until a file is there.
GATED = """
import os
import time

def handle(data, context):
    if data is None:
        return None
    open("{folder}/begun", "w").close()
    while not os.path.exists("{folder}/open"):
        time.sleep(0.01)
    return list(data)
"""
ENVELOPES = ("kserve", "json", "body")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    config = {"service_envelope": "kservev2", "ts_open_inference_protocol": "true", "metrics_mode": "prometheus"}
    with ServerProcess(config=config) as running:
        archive(running.store, "named", NAMED)
        archive(running.store, "rows", ROWS)
        for envelope in ENVELOPES:
            archive(running.store, envelope, ROWS, manifest_overrides={"envelope": envelope})
        yield running


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder beside the model store."""
    for name in ("named", "other"):
        archive(tmp_path, name, NAMED)
    return tmp_path


def register(server: ServerProcess, url: str) -> Reply:
    return server.request("management", "POST", f"/workflows?url={url}", timeout=90)


def unregister(server: ServerProcess, name: str) -> Reply:
    return server.request("management", "DELETE", f"/workflows/{name}", timeout=60)


def ask(server: ServerProcess, workflow: str, body: Any) -> Reply:
    headers = {"content-type": "application/json"}
    return server.request("inference", "POST", f"/wfpredict/{workflow}", body=json.dumps(body), headers=headers)


# Envelopes

TENSOR = {"name": "x", "datatype": "INT64", "shape": [2], "data": [1, 2]}


@pytest.mark.parametrize(
    ("model", "body", "answer"),
    [
        ("kserve", {"instances": [1, {"a": 2}]}, {"predictions": [1, {"a": 2}]}),
        ("json", {"instances": ["one", [2]]}, {"predictions": ["one", [2]]}),
        ("body", {"a": [1]}, {"a": [1]}),
        # That of the server, as the archive names none.
        (
            "rows",
            {"id": "7", "inputs": [TENSOR]},
            {"id": "7", "model_name": "rows", "model_version": "1.0", "outputs": [TENSOR]},
        ),
    ],
)
def test_an_envelope_is_for_models_and_not_for_functions(
    server: ServerProcess, model: str, body: Any, answer: Any
) -> None:
    """TorchServe wraps functions, too, which then get nothing that they can read."""
    war(server.store, "wrapped", f"models: {{m: {{url: {model}.mar}}}}\ndag: {{before: [m], m: [after]}}", FUNCTIONS)
    war(server.store, "bare", f"models: {{m: {{url: {model}.mar}}}}\ndag: {{m: []}}")
    for name in ("wrapped", "bare"):
        assert register(server, f"{name}.war").status == 200
    reply = ask(server, "wrapped", body)
    assert (reply.status, reply.json()) == (200, {"seen": answer})
    reply = ask(server, "bare", body)
    assert (reply.status, reply.json()) == (200, answer)
    assert reply.headers["content-type"] == "application/json"
    for name in ("wrapped", "bare"):
        assert unregister(server, name).status == 200


def test_what_an_envelope_refuses_is_its_node_s_failure(server: ServerProcess) -> None:
    text = "models: {retry-attempts: 0, m: {url: kserve.mar}}\ndag: {before: [m], m: [after]}"
    war(server.store, "refused", text, FUNCTIONS)
    assert register(server, "refused.war").status == 200
    reply = ask(server, "refused", {"inputs": []})
    assert (reply.status, reply.json()["message"]) == (500, "Error executing m")
    eventually(lambda: 'm : The request body has no list "instances".' in server.log(), within=20)
    assert unregister(server, "refused").status == 200


# A full queue


@pytest.mark.parametrize("dag", ["before: [m]", "m: []"])
def test_a_node_whose_queue_is_full(server: ServerProcess, dag: str, tmp_path: Path) -> None:
    """It is told as that of a model is, and not tried again; the client can come again later."""
    source, overrides = GATED.replace("{folder}", str(tmp_path)), {"envelope": "body"}
    archive(server.store, "gated", source, config_yaml="jobQueueSize: 1\n", manifest_overrides=overrides)
    war(server.store, "full", f"models: {{retry-attempts: 2, m: {{url: gated.mar}}}}\ndag: {{{dag}}}", PASSING)
    assert register(server, "full.war").status == 200
    text = 'Model "full__m" has no worker to serve inference request.'
    with ThreadPoolExecutor(2) as clients:
        try:
            under_way = [clients.submit(ask, server, "full", "first")]
            eventually((tmp_path / "begun").exists, within=20, what="the first one at work")
            under_way.append(clients.submit(ask, server, "full", "second"))
            eventually(lambda: pending(server, "full__m") == 1, within=20, what="a full queue")
            held = slots_in_use(server.prefix)
            for path in ("/wfpredict/full", "/v2/models/full/infer"):
                reply = server.request("inference", "POST", path, body=b"third")
                told = reply.json()
                assert (reply.status, told.get("message", told.get("error"))[: len(text)]) == (503, text)
                assert int(reply.headers["retry-after"]) >= 1
            with GrpcClient(server) as client:
                for call in (lambda: client.predict("full", b"x"), lambda: list(client.stream("full", b"x"))):
                    code, told = failure(call)
                    assert (code, told[: len(text)]) == (grpc.StatusCode.INTERNAL, text), "as of a model"
                infer = open_inference_pb2.ModelInferRequest(model_name="full")
                code, told = failure(lambda: client.open_inference.ModelInfer(infer, timeout=30))
                assert (code, told[: len(text)]) == (grpc.StatusCode.INTERNAL, text)
            eventually(lambda: slots_in_use(server.prefix) == held, within=20, what="nothing left of those refused")
            assert "Invoking -  m" not in server.log()
        finally:
            (tmp_path / "open").touch()
        assert [each.result().status for each in under_way] == [200, 200]
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="no slot in use")
    assert ask(server, "full", "next").status == 200
    for code, count in (("503", 5), ("200", 3)):
        counted = f'ts_workflow_requests_total{{workflow_name="full",code="{code}",}} {count}.0'
        eventually(lambda counted=counted: counted in server.request("metrics", "GET", "/metrics").text, within=20)
    assert unregister(server, "full").status == 200


def pending(server: ServerProcess, name: str) -> int:
    [model] = server.request("management", "GET", f"/models/{name}").json()
    return int(model["jobQueueStatus"]["pendingRequests"])


# Archives that come by URL


def state(server: ServerProcess) -> tuple[list[str], list[str], list[str]]:
    """What the store has, and what is registered."""
    models = server.request("management", "GET", "/models").json()["models"]
    workflows = server.request("management", "GET", "/workflows").json()["workflows"]
    names = [each["modelName"] for each in models], [each["workflowName"] for each in workflows]
    return sorted(path.name for path in server.store.iterdir()), *names


@pytest.mark.parametrize(
    ("nodes", "failed"),
    [
        ({"m": "named"}, "m"),
        ({"ok": "kserve.mar", "m": "named"}, "m"),
        ({"far": "other", "m": "named"}, "m"),
    ],
)
def test_a_model_whose_archive_is_in_the_store_already(
    server: ServerProcess, elsewhere: Path, nodes: dict[str, str], failed: str
) -> None:
    """It is another one, maybe: nothing is registered, and what was in the store before stays there."""
    urls = {name: url if url.endswith(".mar") else f"file://{elsewhere}/{url}.mar" for name, url in nodes.items()}
    models = "".join(f"  {name}: {{url: '{url}'}}\n" for name, url in urls.items())
    war(server.store, "known", f"models:\n{models}dag:\n  before: [{', '.join(nodes)}]\n")
    before, content = state(server), (server.store / "named.mar").read_bytes()
    reply = register(server, "known.war")
    told = f"Workflow Node known__{failed} failed to register. Details: Model file already exists named.mar"
    message = f"Workflow known has failed to register. Failures: [{told}]"
    assert (reply.status, reply.json()["type"], reply.json()["message"]) == (500, "WorkflowException", message)
    assert state(server) == before
    assert (server.store / "named.mar").read_bytes() == content
    for name in ("known__before", *(f"known__{node}" for node in nodes)):
        assert server.request("management", "GET", f"/models/{name}").status == 404
    assert server.request("inference", "POST", "/wfpredict/known", body=b"x").status == 404


def test_a_workflow_that_comes_by_url_with_such_a_model(server: ServerProcess, elsewhere: Path) -> None:
    """The workflow's archive goes again; the model's, which it has not brought, stays."""
    war(elsewhere, "brought", f"models: {{m: {{url: 'file://{elsewhere}/named.mar'}}}}\ndag: {{before: [m]}}\n")
    before = state(server)
    reply = register(server, f"file://{elsewhere}/brought.war")
    assert (reply.status, reply.json()["type"]) == (500, "WorkflowException")
    assert "Details: Model file already exists named.mar]" in reply.json()["message"]
    assert state(server) == before


def test_archives_of_models_go_with_their_workflow(server: ServerProcess, elsewhere: Path) -> None:
    url = f"file://{elsewhere}/other.mar"
    war(server.store, "fetched", f"models: {{m: {{url: '{url}'}}}}\ndag: {{m: []}}\n")
    before = state(server)
    assert register(server, "fetched.war").status == 200
    assert (server.store / "other.mar").exists()
    assert unregister(server, "fetched").status == 200
    assert state(server) == before
