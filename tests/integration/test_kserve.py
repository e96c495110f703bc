"""KServe's protocols, v1 and v2, and the request envelopes, over a running server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

#: One result for each of the rows that the envelope hands over: the row, and how many there were.
ROWS = """
def handle(data, context):
    if data is None:
        return None
    return [{"row": row.decode("latin-1") if isinstance(row, bytes) else row, "of": len(data)} for row in data]
"""

#: Hands tensors back, as they came.
TENSORS = """
import numpy

def handle(data, context):
    if data is None:
        return None
    values = [row["data"] for row in data]
    return [numpy.array(each, dtype="float32") if each == [0.5, 0.25] else each for each in values]
"""

#: As the first handler of TorchServe's tutorials: the likeliest digit.
DIGITS = """
from ts.torch_handler.image_classifier import ImageClassifier

class Digits(ImageClassifier):
    def postprocess(self, data):
        return data.argmax(1).tolist()
"""
#: Its model: the digit is how bright the picture is.
BRIGHTNESS = """
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        return -(torch.arange(10.0) - 10 * images.mean(dim=(1, 2, 3))[:, None]).abs()
"""

TOO_FEW = """
def handle(data, context):
    if data is None:
        return None
    return ["only one"]
"""

MODELS = {
    "rows_kserve": (ROWS, "kserve"),
    "rows_json": (ROWS, "json"),
    "few": (TOO_FEW, "kserve"),
    "tensors": (TENSORS, "kservev2"),
    "tensors_batch": (TENSORS, "kservev2"),
    "plain": (ROWS, "body"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    batched = "batchSize: 3\nmaxBatchDelay: 120000\nbatchPolicy: fixed\n"
    for name, (source, envelope) in MODELS.items():
        yaml = batched if name in ("few", "tensors_batch") else None
        archive(store, name, source, config_yaml=yaml, manifest_overrides={"envelope": envelope})
    overrides = {"envelope": "kservev2", "modelFile": "model.py"}
    archive(store, "mnist", DIGITS, files={"model.py": BRIGHTNESS}, manifest_overrides=overrides)
    archive(store, "batch", ROWS, config_yaml=batched, manifest_overrides={"envelope": "kserve"})
    environment = {"TS_OPEN_INFERENCE_PROTOCOL": "oip"}
    with ServerProcess(store=store, environment=environment) as running:
        for name in (*MODELS, "batch", "mnist"):
            reply = running.register(f"{name}.mar")
            assert reply.status == 200, reply.text
        yield running


def post(server: ServerProcess, path: str, body: Any) -> Reply:
    kind = {"content-type": "application/json"}
    return server.request("inference", "POST", path, headers=kind, body=json.dumps(body))


def together(server: ServerProcess, path: str, bodies: list[Any]) -> list[Reply]:
    """Sends requests that the model's batching joins."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: post(server, path, body), bodies))


# Version 1


@pytest.mark.parametrize(("verb", "key"), [("predict", "predictions"), ("explain", "explanations")])
def test_v1(server: ServerProcess, verb: str, key: str) -> None:
    reply = post(server, f"/v1/models/rows_kserve:{verb}", {"instances": [1, {"x": [2.5]}, "ü"]})
    assert reply.status == 200
    assert reply.json() == {key: [{"row": row, "of": 3} for row in (1, {"x": [2.5]}, "ü")]}


def test_v1_batch_of_several_requests(server: ServerProcess) -> None:
    bodies = [{"instances": instances} for instances in (["a"], [1, 2], [])]
    replies = together(server, "/v1/models/batch:predict", bodies)
    rows = [[each["row"] for each in reply.json()["predictions"]] for reply in replies]
    assert rows == [["a"], [1, 2], []]
    assert replies[0].json()["predictions"][0]["of"] == 3


def test_v1_batch_with_too_few_results(server: ServerProcess) -> None:
    for reply in together(server, "/v1/models/few:predict", [{"instances": [1]}] * 3):
        assert (reply.status, reply.json()["message"]) == (503, "number of batch response mismatched")


def test_a_body_of_another_form_costs_its_neighbours_nothing(server: ServerProcess) -> None:
    good = tensor("INT64", [1], [7])
    batches: dict[str, list[Any]] = {
        "/v1/models/batch:predict": [{"instances": ["a"]}, {"instances": 1}, {"instances": ["b"]}],
        "/v2/models/tensors_batch/infer": [
            {"inputs": [good]},
            {"inputs": [{**good, "shape": [3]}]},
            {"inputs": [good]},
        ],
    }
    for path, bodies in batches.items():
        replies = together(server, path, bodies)
        assert [reply.status for reply in replies] == [200, 400, 200]
    assert [reply.json()["outputs"][0]["data"] for reply in (replies[0], replies[2])] == [[7], [7]]
    assert replies[0].json()["id"] == replies[0].headers["x-request-id"]


@pytest.mark.parametrize("body", [{}, {"instances": 1}, [1], "text"])
def test_v1_body_of_another_form(server: ServerProcess, body: Any) -> None:
    reply = post(server, "/v1/models/rows_kserve:predict", body)
    assert (reply.status, reply.json()["type"]) == (400, "BadRequestException")
    assert reply.json()["message"].startswith("The request body ")


def test_v1_readiness(server: ServerProcess) -> None:
    ready = server.request("management", "GET", "/v1/models/rows_kserve")
    assert (ready.status, ready.json()) == (200, {"name": "rows_kserve", "ready": True})


def test_json_envelope(server: ServerProcess) -> None:
    encoded = base64.b64encode(b"\xff").decode()
    reply = post(server, "/predictions/rows_json", {"instances": [{"b64": encoded}, 3]})
    assert reply.json() == {"predictions": [{"row": "\xff", "of": 2}, {"row": 3, "of": 2}]}


def test_body_envelope(server: ServerProcess) -> None:
    assert post(server, "/predictions/plain", {"a": 1}).json() == {"row": {"a": 1}, "of": 1}


# Version 2


def tensor(kind: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": "input", "shape": shape, "datatype": kind, "data": data}


@pytest.mark.parametrize(
    ("kind", "shape", "data", "out_kind", "out"),
    [
        ("BYTES", [1], ["héllo"], "BYTES", ["héllo"]),
        ("BYTES", [2], ["a", "b"], "BYTES", ["a", "b"]),
        ("BOOL", [2], [True, False], "BOOL", [True, False]),
        ("UINT8", [2], [0, 255], "INT64", [0, 255]),
        ("INT64", [2, 2], [1, 2, 3, -4], "INT64", [1, 2, 3, -4]),
        ("FP16", [1], [1.5], "FP64", [1.5]),
        ("FP32", [2, 1], [1.25, 2], "FP64", [1.25, 2.0]),
        ("FP64", [2], [0.5, 0.25], "FP32", [0.5, 0.25]),
    ],
)
def test_v2_datatypes(
    server: ServerProcess, kind: str, shape: list[int], data: list[Any], out_kind: str, out: list[Any]
) -> None:
    body = {"id": "mine", "inputs": [tensor(kind, shape, data)]}
    reply = post(server, "/v2/models/tensors/infer", body)
    assert reply.status == 200, reply.text
    outputs = [{"name": "input", "shape": [len(out)], "datatype": out_kind, "data": out}]
    assert reply.json() == {"id": "mine", "model_name": "tensors", "model_version": "1.0", "outputs": outputs}


def test_v2_without_an_id_has_the_request_s(server: ServerProcess) -> None:
    inputs = [tensor("INT8", [1], [1]), tensor("BYTES", [1], ["x"])]
    reply = post(server, "/v2/models/tensors/explain", {"inputs": inputs})
    assert reply.json()["id"] == reply.headers["x-request-id"]
    assert [each["name"] for each in reply.json()["outputs"]] == ["input", "input"]


def test_v2_numbers_into_an_image_handler(server: ServerProcess) -> None:
    pixels = {"name": "input-0", "shape": [1, 28, 28], "datatype": "FP32", "data": [0.1] * 784}
    reply = post(server, "/v2/models/mnist/infer", {"inputs": [pixels]})
    assert reply.status == 200, reply.text
    assert reply.json()["outputs"] == [{"name": "input-0", "shape": [1], "datatype": "INT64", "data": [1]}]
    reply = post(server, "/v2/models/mnist/explain", {"inputs": [pixels]})
    assert reply.status == 200, reply.text
    (explained,) = reply.json()["outputs"]
    # How much each pixel speaks for class 0: 28 times 28 times a 784th of -10 times a tenth.
    assert (explained["name"], explained["shape"], explained["datatype"]) == ("input-0", [784], "FP64")
    assert sum(explained["data"]) == pytest.approx(-1, abs=1e-3)


def test_v2_batch_of_several_requests(server: ServerProcess) -> None:
    bodies = [{"id": str(n), "inputs": [tensor("INT64", [1], [n])] * n} for n in (1, 2, 3)]
    for number, reply in enumerate(together(server, "/v2/models/tensors_batch/infer", bodies), 1):
        assert reply.json()["id"] == str(number)
        assert [each["data"] for each in reply.json()["outputs"]] == [[number]] * number


@pytest.mark.parametrize(
    "inputs", [None, [1], [tensor("NOSUCH", [1], [1])], [tensor("INT8", [3], [1])], [tensor("INT8", [1], [1000])]]
)
def test_v2_input_of_another_form(server: ServerProcess, inputs: Any) -> None:
    assert post(server, "/v2/models/tensors/infer", {"inputs": inputs}).status == 400


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v2", {"name": "Torchserve", "version": "0.12.0", "extenstion": ["kserve", "kubeflow"]}),
        ("/v2/", {"name": "Torchserve", "version": "0.12.0", "extenstion": ["kserve", "kubeflow"]}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/plain/ready", {"name": "plain", "ready": True}),
        ("/v2/models/plain", {"name": "plain", "versions": ["1.0"], "platform": "", "inputs": [], "outputs": []}),
    ],
)
def test_v2_server_and_models(server: ServerProcess, path: str, answer: dict[str, Any]) -> None:
    reply = server.request("inference", "GET", path)
    assert (reply.status, reply.json()) == (200, answer)


def test_v2_model_that_is_not_ready(server: ServerProcess) -> None:
    assert server.register("plain.mar", model_name="idle", initial_workers=0).status == 200

    def readiness() -> tuple[int, Any]:
        reply = server.request("inference", "GET", "/v2/models/idle/ready")
        return reply.status, reply.json()

    assert readiness() == (503, {"name": "idle", "ready": False})
    assert server.request("management", "PUT", "/models/idle?min_worker=1&synchronous=true").status == 200
    eventually(lambda: readiness() == (200, {"name": "idle", "ready": True}), within=5, what="a ready model")
    assert server.request("management", "DELETE", "/models/idle").status == 200
    gone = server.request("inference", "GET", "/v2/models/idle/ready")
    assert (gone.status, gone.json()["message"]) == (404, "Model not found: idle")


@pytest.mark.parametrize("path", ["/v2/models/plain/versions/1", "/v2/models/plain/versions/1/infer"])
def test_v2_versions(server: ServerProcess, path: str) -> None:
    reply = server.request("inference", "POST", path, body=b"{}")
    assert (reply.status, reply.json()) == (501, {"error": "Model versioning is not yet supported."})


@pytest.mark.parametrize("path", ["/v2/models", "/v2/models/plain/versions", "/v2/health", "/v2/nope"])
def test_v2_other_paths(server: ServerProcess, path: str) -> None:
    reply = server.request("inference", "GET", path)
    assert (reply.status, reply.json()["type"]) == (404, "ResourceNotFoundException")


def test_v2_needs_its_switch(echo_server: ServerProcess) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/models/echo", "/v2/models/echo/ready", "/v2/models/echo/versions/1"):
        assert echo_server.request("inference", "GET", path).status == 404
    body = json.dumps({"inputs": []})
    assert echo_server.request("inference", "POST", "/v2/models/echo/infer", body=body).text == body
