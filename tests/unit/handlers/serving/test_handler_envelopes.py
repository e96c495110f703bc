"""Envelopes unwrap what their protocol sends, and wrap up what the handler returns."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.envelopes import (
    BaseEnvelope,
    BodyEnvelope,
    JSONEnvelope,
    KServeEnvelope,
    KServev2Envelope,
)
from wsgi_ts.handlers.serving.errors import BatchFailure, PredictionException
from wsgi_ts.handlers.serving.inputs import Request, build_row
from wsgi_ts.handlers.serving.service import Service

LoadModel = Callable[..., Service]


def make_context(**headers: str) -> Context:
    manifest = {"model": {"modelName": "mn", "modelVersion": "2.0"}}
    context = Context("m", "/dir", manifest, 4, None)
    context._begin_batch({0: "rid"}, [headers])
    return context


def echo(data: Any, context: Any) -> Any:
    return data


def test_the_body_envelope_unwraps_rows() -> None:
    envelope = BodyEnvelope(echo)
    assert envelope.handle([{"data": 1, "body": 2}, {"body": b"x"}], make_context()) == [1, b"x"]
    assert envelope.handle(None, make_context()) is None


def test_the_json_envelope_joins_the_instances_and_splits_the_predictions() -> None:
    seen: list[Any] = []

    def handle(data: Any, context: Any) -> Any:
        seen.extend(data)
        return ["a", b"b", 3, 4]

    encoded = base64.b64encode(b"\xff\x00").decode()
    rows = [
        {"body": {"instances": [{"b64": encoded}, {"x": {"b64": encoded}, "y": [1]}]}},
        {"data": json.dumps({"instances": [5]}).encode()},
        {"instances": [7]},
    ]
    answers = JSONEnvelope(handle).handle(rows, make_context())
    assert seen == [b"\xff\x00", {"x": b"\xff\x00", "y": [1]}, 5, 7]
    assert [json.loads(answer)["predictions"] for answer in answers] == [["a", "b"], [3], [4]]


@pytest.mark.parametrize(("explain", "key"), [("False", "predictions"), ("True", "explanations")])
def test_kserve_v1(explain: str, key: str) -> None:
    row = {"body": bytearray(b'{"instances": [1, 2]}')}
    assert KServeEnvelope(echo).handle([row], make_context(explain=explain)) == [{key: [1, 2]}]


def values(data: Any, context: Any) -> Any:
    """A handler that answers with what it is given to work on."""
    return [row["data"] for row in data]


def test_kserve_v2() -> None:
    body = {
        "id": "mine",
        "inputs": [
            {"name": "a", "datatype": "BYTES", "shape": [1], "data": ["text"]},
            {"name": "b", "datatype": "INT64", "shape": [2, 2], "data": [1, 2, 3, 4]},
            {"name": "c", "datatype": "FP32", "shape": [2], "data": [0.5, 1]},
        ],
    }
    (answer,) = KServev2Envelope(values).handle([{"body": body}], make_context())
    assert answer == {
        "id": "mine",
        "model_name": "mn",
        "model_version": "2.0",
        "outputs": [
            {"name": "a", "shape": [1], "datatype": "BYTES", "data": ["text"]},
            {"name": "b", "shape": [4], "datatype": "INT64", "data": [1, 2, 3, 4]},
            {"name": "c", "shape": [2], "datatype": "FP64", "data": [0.5, 1.0]},
        ],
    }
    del body["id"]
    assert KServev2Envelope(values).handle([{"body": body}], make_context())[0]["id"] == "rid"


def test_kserve_v2_with_the_context_of_a_handlers_own_test() -> None:
    context = SimpleNamespace(manifest={"model": {}}, get_request_id=lambda row: "rid")
    tensor = {"name": "a", "datatype": "INT64", "shape": [1], "data": [1]}
    (answer,) = KServev2Envelope(values).handle([{"body": {"inputs": [tensor]}}], cast(Context, context))
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("rid", None, None)


def test_kserve_v2_rows_are_the_tensors_as_they_came() -> None:
    tensor = {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], "target": 1}
    assert KServev2Envelope(echo).parse_input([{"body": {"inputs": [tensor]}}]) == [{**tensor, "data": [[1.0, 2.0]]}]


@pytest.mark.parametrize(
    "tensor",
    [
        # KServe's own sample for images.
        {"name": "312a4eb0", "shape": -1, "datatype": "BYTES", "data": "iVBORw0KGgo="},
        {"name": "a", "datatype": "BYTES", "data": "text"},
        {"name": "b", "datatype": "FP32", "data": [[1.5], [2.5]]},
    ],
)
def test_kserve_v2_tensors_that_need_no_shape(tensor: dict[str, Any]) -> None:
    assert KServev2Envelope(echo).parse_input([{"body": {"inputs": [tensor]}}]) == [tensor]


@pytest.mark.parametrize(
    ("results", "outputs"),
    [
        (["a\0", b"\xc3\xbc"], [("a", "BYTES", ["a\0"]), ("b", "BYTES", ["ü"])]),
        ([{"x": 1}, [{"y": 2}, {}]], [("a", "BYTES", [{"x": 1}]), ("b", "BYTES", [{"y": 2}, {}])]),
        ([[], ["x", "y"]], [("a", "FP64", []), ("b", "BYTES", ["x", "y"])]),
        ([1, True, 2.5], [("a", "INT64", [1]), ("b", "BOOL", [True]), ("predict-2", "FP64", [2.5])]),
        ([7], [("a", "INT64", [7])]),
    ],
)
def test_kserve_v2_names_results_as_their_inputs(results: list[Any], outputs: list[tuple[str, str, Any]]) -> None:
    inputs = [{"name": name, "datatype": "INT64", "shape": [1], "data": [1]} for name in "ab"]
    (answer,) = KServev2Envelope(lambda data, context: results).handle([{"body": {"inputs": inputs}}], make_context())
    assert [(each["name"], each["datatype"], each["data"]) for each in answer["outputs"]] == outputs
    assert [each["shape"] for each in answer["outputs"]] == [[len(data)] for _, _, data in outputs]


def test_kserve_answers_each_request_of_a_batch() -> None:
    context = Context("m", "/dir", {"model": {}}, 4, None)
    context._begin_batch({0: "r0", 1: "r1"}, [{"explain": "False"}, {"explain": "True"}])
    rows = [{"body": {"instances": [1, 2]}}, {"body": {"instances": [3]}}]
    assert KServeEnvelope(echo).handle(rows, context) == [{"predictions": [1, 2]}, {"explanations": [3]}]
    tensors = [{"name": "x", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}]
    rows = [{"body": {"inputs": tensors}}, {"body": {"id": "mine", "inputs": []}}]
    first, second = KServev2Envelope(values).handle(rows, context)
    assert (first["id"], first["outputs"][0]["data"]) == ("r0", ["a", "b"])
    assert (second["id"], second["outputs"]) == ("mine", [])


PARTS = """
from ts.handler_utils.utils import send_intermediate_predict_response as send

def handle(data, context):
    if data is None:
        return None
    send(["part"] * len(data), context.request_ids, "", 200, context)
    context.set_response_status(201, "Made", len(data) - 1)
    return [[row, len(data)] for row in data]
"""


def test_rows_that_cannot_be_read_are_answered_by_themselves(load_model: LoadModel) -> None:
    chunks: list[tuple[int, bytes]] = []

    def send_chunk(row: int, status: int, phrase: str, headers: Any, body: bytes) -> None:
        chunks.append((row, body))

    service = load_model("parts.py", {"parts.py": PARTS}, chunks=send_chunk, envelope="kserve")
    bodies: list[Any] = [b"{", {"instances": [1]}, {"instances": 5}, {"instances": [2]}]
    requests = [Request(f"id{row}", {"body": body}, {}) for row, body in enumerate(bodies)]
    no_json, first, no_list, second = service.predict(requests)
    assert (no_json.status, no_json.error, no_json.body) == (400, True, b"The request body is not JSON.")
    assert (no_list.status, no_list.error) == (400, True)
    assert [json.loads(bytes(answer.body)) for answer in (first, second)] == [
        {"predictions": [[1, 2]]},
        {"predictions": [[2, 2]]},
    ]
    assert (first.status, second.status) == (200, 201)
    assert chunks == [(1, b"part"), (3, b"part")]
    assert not service.raised
    assert service.context.request_ids == {0: "id0", 1: "id1", 2: "id2", 3: "id3"}
    assert service.context.get_response_status(3) == (201, "Made")
    assert [answer.status for answer in service.predict(requests[:1] * 2)] == [400, 400]
    assert service.context.cl_socket is send_chunk


@pytest.mark.parametrize("envelope", [JSONEnvelope, KServeEnvelope])
def test_results_that_belong_to_no_request_fail_the_batch(envelope: type[BaseEnvelope]) -> None:
    rows = [{"body": {"instances": [1]}}, {"body": {"instances": [2]}}]
    with pytest.raises(BatchFailure):
        envelope(lambda data, context: ["one"]).handle(rows, make_context())


@pytest.mark.parametrize(
    ("envelope", "body"),
    [
        (JSONEnvelope, b"not json"),
        (JSONEnvelope, b"[1]"),
        (JSONEnvelope, {"instances": 1}),
        (JSONEnvelope, {"instances": [{"b64": "?"}]}),
        (JSONEnvelope, {"instances": [{"b64": 5}]}),
        (KServeEnvelope, {}),
        (KServeEnvelope, b"[" * 100_000),
        (KServev2Envelope, {"inputs": [1]}),
        (KServev2Envelope, {"inputs": [{"datatype": "INT8", "shape": [1], "data": [1000]}]}),
        (KServev2Envelope, {"inputs": [{"datatype": "NOSUCH", "shape": [1], "data": [1]}]}),
        (KServev2Envelope, {"inputs": [{"datatype": "INT8", "shape": [3], "data": [1]}]}),
        (KServev2Envelope, {"inputs": [{"datatype": "BYTES", "shape": [0], "data": []}]}),
    ],
)
def test_bodies_of_another_form_are_answered_400(envelope: type[BaseEnvelope], body: Any) -> None:
    with pytest.raises(PredictionException) as failure:
        envelope(echo).handle([{"body": body}], make_context())
    assert failure.value.error_code == 400


@pytest.mark.parametrize("envelope", [JSONEnvelope, KServeEnvelope, KServev2Envelope])
@pytest.mark.parametrize("body", [b'{"instances": [1]}', b'{"instances": [{"b64": "aQ=="}]}', b""])
def test_json_that_came_as_a_form_is_told_of_its_content_type(envelope: type[BaseEnvelope], body: bytes) -> None:
    row = build_row("application/x-www-form-urlencoded", memoryview(body))
    with pytest.raises(PredictionException, match=r"curl -d .* content-type: application/json") as failure:
        envelope(echo).handle([row], make_context())
    assert failure.value.error_code == 400
