"""The gRPC APIs without a server: the messages, the codes, what lies in a slot, KServe's tensors."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from hypothesis import given
from hypothesis import strategies as st
from support.server import REPOSITORY

from wsgi_ts import errors
from wsgi_ts.batcher.shm.body_codec import pack_fields, unpack_fields
from wsgi_ts.errors import ServerError
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.codes import Failure, code_of, inference_failure, management_failure
from wsgi_ts.rpc.open_inference import infer_body, infer_response
from wsgi_ts.rpc.status import StatusCode

PROTOS = REPOSITORY / "wsgi_ts" / "rpc" / "protos"
_TYPES = descriptor_pb2.FieldDescriptorProto.Type

#: TorchServe's messages with their fields, `number type name`; "?" optional, "*" repeated.
CONTRACT = {
    "inference.PredictionsRequest": "1 string model_name; 2 string model_version; 3 map input; 4 string? sequence_id",
    "inference.PredictionResponse": "1 bytes prediction; 2 string? sequence_id; 3 message? status",
    "inference.TorchServeHealthResponse": "1 string health",
    "management.ManagementResponse": "1 string msg",
    "management.DescribeModelRequest": "1 string model_name; 2 string model_version; 3 bool customized",
    "management.ListModelsRequest": "1 int32 limit; 2 int32 next_page_token",
    "management.RegisterModelRequest": "1 int32 batch_size; 2 string handler; 3 int32 initial_workers; "
    "4 int32 max_batch_delay; 5 string model_name; 6 int32 response_timeout; 7 string runtime; 8 bool synchronous; "
    "9 string url; 10 bool s3_sse_kms; 11 int32 startup_timeout",
    "management.ScaleWorkerRequest": "1 string model_name; 2 string model_version; 3 int32 max_worker; "
    "4 int32 min_worker; 5 int32 number_gpu; 6 bool synchronous; 7 int32 timeout",
    "management.SetDefaultRequest": "1 string model_name; 2 string model_version",
    "management.UnregisterModelRequest": "1 string model_name; 2 string model_version",
    "openinference.ServerLiveResponse": "1 bool live",
    "openinference.ServerReadyResponse": "1 bool ready",
    "openinference.ModelReadyRequest": "1 string name; 2 string version",
    "openinference.ModelReadyResponse": "1 bool ready",
    "openinference.ModelMetadataRequest": "1 string name; 2 string version",
    "openinference.ModelMetadataResponse": "1 string name; 2 string* versions; 3 string platform; 4 message* inputs; "
    "5 message* outputs",
    "openinference.ModelInferRequest": "1 string model_name; 2 string model_version; 3 string id; 4 map parameters; "
    "5 message* inputs; 6 message* outputs; 7 bytes* raw_input_contents",
    "openinference.ModelInferRequest.InferInputTensor": "1 string name; 2 string datatype; 3 int64* shape; "
    "4 map parameters; 5 message contents",
    "openinference.ModelInferResponse": "1 string model_name; 2 string model_version; 3 string id; 4 map parameters; "
    "5 message* outputs; 6 bytes* raw_output_contents",
    "openinference.InferParameter": "1 bool bool_param; 2 int64 int64_param; 3 string string_param",
    "openinference.InferTensorContents": "1 bool* bool_contents; 2 int32* int_contents; 3 int64* int64_contents; "
    "4 uint32* uint_contents; 5 uint64* uint64_contents; 6 float* fp32_contents; 7 double* fp64_contents; "
    "8 bytes* bytes_contents",
}
#: TorchServe's services with their methods; "*" before a message: a stream of it.
SERVICES = {
    "inference.InferenceAPIsService": "Ping Empty TorchServeHealthResponse; Predictions PredictionsRequest "
    "PredictionResponse; StreamPredictions PredictionsRequest *PredictionResponse; StreamPredictions2 "
    "*PredictionsRequest *PredictionResponse",
    "management.ManagementAPIsService": "; ".join(
        f"{name} {name}Request ManagementResponse"
        for name in ("DescribeModel", "ListModels", "RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel")
    ),
    "grpc.health.v1.Health": (
        "Check HealthCheckRequest HealthCheckResponse; Watch HealthCheckRequest *HealthCheckResponse"
    ),
    "openinference.GRPCInferenceService": "; ".join(
        f"{name} {name}Request {name}Response"
        for name in (
            *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
            *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
        )
    ),
}


def files() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString((PROTOS / "descriptors.binpb").read_bytes())


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    made = tmp_path / "descriptors.binpb"
    well_known = Path(protoc.__file__).parent / "_proto"
    arguments = [f"-I{PROTOS}", f"-I{well_known}", "--include_imports", f"--descriptor_set_out={made}"]
    names = ["inference.proto", "management.proto", "open_inference_grpc.proto", "health.proto"]
    names += ["google/rpc/error_details.proto", "xds/data/orca/v3/orca_load_report.proto"]
    assert protoc.main(["protoc", *arguments, *names]) == 0
    assert descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()) == files()


def test_messages_are_those_of_torchserve() -> None:
    found: dict[str, str] = {}

    def add(prefix: str, message: Any) -> None:
        maps = {each.name for each in message.nested_type if each.options.map_entry}
        fields = []
        for field in message.field:
            kind = _TYPES.Name(field.type).removeprefix("TYPE_").lower()
            if field.type_name.rpartition(".")[2] in maps:
                kind = "map"
            elif field.label == field.LABEL_REPEATED:
                kind += "*"
            elif field.proto3_optional:
                kind += "?"
            fields.append(f"{field.number} {kind} {field.name}")
        found[f"{prefix}.{message.name}"] = "; ".join(fields)
        for nested in message.nested_type:
            add(f"{prefix}.{message.name}", nested)

    for file in files().file:
        for message in file.message_type:
            add(file.package.removeprefix("org.pytorch.serve.grpc."), message)
    assert {name: found[name] for name in CONTRACT} == CONTRACT


def test_services_are_those_of_torchserve_and_grpc_s_health() -> None:
    found = {}
    for file in files().file:
        for service in file.service:
            methods = []
            for method in service.method:
                asked, answered = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
                asked = "*" * method.client_streaming + asked
                answered = "*" * method.server_streaming + answered
                methods.append(f"{method.name} {asked} {answered}")
            found[f"{file.package.removeprefix('org.pytorch.serve.grpc.')}.{service.name}"] = "; ".join(methods)
    assert found == SERVICES


def test_no_other_process_loads_grpc() -> None:
    web = "wsgi_ts.web.gunicorn_app, wsgi_ts.web.worker, wsgi_ts.rest.inference, wsgi_ts.dataplane.descriptions"
    others = "wsgi_ts.cli.commands, wsgi_ts.supervisor.supervisor"
    others += ", wsgi_ts.batcher.main, wsgi_ts.batcher.worker.main"
    code = f"import sys; import {web}, {others}; print('grpc' in sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "False"


# Codes


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (200, "OK"),
        (204, "OK"),
        (400, "INVALID_ARGUMENT"),
        (401, "UNAUTHENTICATED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
        (408, "DEADLINE_EXCEEDED"),
        (409, "ABORTED"),
        (413, "RESOURCE_EXHAUSTED"),
        (416, "OUT_OF_RANGE"),
        (418, "FAILED_PRECONDITION"),
        (429, "RESOURCE_EXHAUSTED"),
        (499, "CANCELLED"),
        (500, "INTERNAL"),
        (501, "UNIMPLEMENTED"),
        (503, "UNAVAILABLE"),
        (504, "DEADLINE_EXCEEDED"),
        (507, "INTERNAL"),
        (302, "UNKNOWN"),
        (600, "UNKNOWN"),
    ],
)
def test_http_statuses_as_codes(status: int, code: str) -> None:
    assert code_of(status).name == code


ERRORS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ServerError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_a_code_that_says_error(kind: type[Any]) -> None:
    arguments = ("the text",) if "message" in inspect.signature(kind).parameters else ()
    error = kind(*arguments)
    for failure in (inference_failure(error), management_failure(error)):
        assert failure.code not in (StatusCode.OK, StatusCode.UNKNOWN)
        assert failure.description.startswith(error.message)


def test_management_errors_as_they_come_from_the_supervisor() -> None:
    """Over the control socket an error is a status, a type and a text."""

    def said(kind: type[ServerError]) -> tuple[str, str]:
        failure = management_failure(ServerError.from_dict(kind("text").to_dict()))
        return failure.code.name, failure.description

    package = "org.pytorch.serve"
    assert said(errors.ModelNotFound) == ("NOT_FOUND", f"text\n{package}.archive.model.ModelNotFoundException")
    assert said(errors.BadRequest) == ("INVALID_ARGUMENT", f"text\n{package}.http.BadRequestException")
    assert said(errors.InvalidModel) == ("INVALID_ARGUMENT", f"text\n{package}.archive.model.InvalidModelException")
    assert said(errors.DownloadFailed) == ("INVALID_ARGUMENT", f"text\n{package}.archive.DownloadArchiveException")
    assert said(errors.ConflictStatus) == ("ALREADY_EXISTS", f"text\n{package}.http.ConflictStatusException")
    assert said(errors.InvalidModelVersion)[0] == "FAILED_PRECONDITION"
    assert said(errors.OutOfResources)[0] == "INTERNAL"
    assert said(errors.ServiceUnavailable)[0] == "UNAVAILABLE"


def test_a_description_is_text_that_can_be_sent() -> None:
    assert Failure(StatusCode.INTERNAL, "a \ud800 surrogate").description == "a ? surrogate"


# What lies in a slot


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.binary()))
def test_fields_come_out_as_they_went_in(fields: dict[str, bytes]) -> None:
    found = unpack_fields(memoryview(b"".join(pack_fields(fields))))
    assert found == fields
    assert all(type(value) is bytearray for value in found.values())


# The open inference protocol


def test_tensors_as_json() -> None:
    request = messages.ModelInferRequest(model_name="m", id="7")
    request.inputs.add(name="a", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -2])
    request.inputs.add(name="b", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"\xff")
    request.inputs.add(name="c", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    request.inputs.add(name="d", datatype="strange", shape=[1])
    assert infer_body(request) == {
        "id": "7",
        "model_name": "m",
        "inputs": [
            {"name": "a", "shape": [2], "datatype": "INT8", "data": [1, -2]},
            {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["/w=="]},
            {"name": "c", "shape": [1], "datatype": "BOOL", "data": [True]},
            {"name": "d", "shape": [1], "datatype": "strange"},
        ],
    }


@pytest.mark.parametrize(
    ("datatype", "raw", "data"),
    [
        ("BOOL", b"\1\0", [True, False]),
        ("INT16", b"\xff\xff\2\0", [-1, 2]),
        ("UINT64", b"\1" + b"\0" * 7, [1]),
        ("FP16", b"\0\x3c", [1.0]),
        ("FP32", b"\0\0\x80\x3f", [1.0]),
        ("BYTES", b"\2\0\0\0hi\0\0\0\0", ["aGk=", ""]),
        ("INT32", b"", []),
    ],
)
def test_raw_tensors(datatype: str, raw: bytes, data: list[Any]) -> None:
    request = messages.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[len(data)])
    (tensor,) = infer_body(request)["inputs"]
    assert tensor["data"] == data


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [
        ("INT32", b"\1"),
        ("BYTES", b"\2\0\0"),
        ("BYTES", b"\2\0\0\0h"),
        ("strange", b""),
    ],
)
def test_raw_tensors_that_are_none(datatype: str, raw: bytes) -> None:
    request = messages.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[1])
    with pytest.raises(Failure, match="x") as caught:
        infer_body(request)
    assert caught.value.code == StatusCode.INVALID_ARGUMENT
    request.raw_input_contents.append(b"")
    with pytest.raises(Failure, match="2 raw_input_contents for 1 inputs"):
        infer_body(request)


def test_an_answer_as_tensors() -> None:
    outputs = [
        {"name": "a", "datatype": "FP64", "shape": [1], "data": [0.5]},
        {"name": "b", "datatype": "BYTES", "shape": [2], "data": ["text", {"k": 1}]},
        {"name": "c", "datatype": "INT64", "shape": [0], "data": []},
    ]
    answer = infer_response(json.dumps({"id": None, "model_name": "m", "outputs": outputs}).encode())
    assert (answer.id, answer.model_name, answer.model_version) == ("", "m", "")
    assert list(answer.outputs[0].contents.fp64_contents) == [0.5]
    assert list(answer.outputs[1].contents.bytes_contents) == [b'"text"', b'{"k": 1}']
    assert answer.outputs[2].HasField("contents")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"model_name": "m", "outputs": [{}]}',
        b'{"model_name": "m", "outputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": ["text"]}]}',
        b'{"model_name": "m", "outputs": [{"name": "x", "datatype": "strange", "shape": [1], "data": [1]}]}',
        b'{"model_name": "m", "outputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [99999999999]}]}',
    ],
)
def test_answers_that_are_no_tensors(answer: bytes) -> None:
    with pytest.raises(Failure, match="none of the open inference protocol") as caught:
        infer_response(answer)
    assert caught.value.code == StatusCode.INTERNAL


def test_the_codes_are_grpcs() -> None:
    assert {each.name: each.value for each in StatusCode} == {each.name: each.value[0] for each in grpc.StatusCode}
