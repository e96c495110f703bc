"""The open inference protocol (KServe v2) over gRPC, with `ts_open_inference_protocol`.

A request becomes the JSON body that the REST protocol has, a prediction like others; its handler reads and answers it
as the envelope `kservev2` does.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from wsgi_ts.dataplane.async_plane import AsyncPlane
from wsgi_ts.dataplane.routes import DEFAULT_VERSION
from wsgi_ts.errors import ServerError
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.calls import Calls
from wsgi_ts.rpc.codes import Failure, bad_request, management_failure
from wsgi_ts.rpc.management import Management
from wsgi_ts.rpc.status import StatusCode

NAME = f"{messages.OPEN_INFERENCE}.GRPCInferenceService"
#: The protocol's own name of the service, which KServe's and Triton's clients call; the messages are the same.
PROTOCOL_NAME = "inference.GRPCInferenceService"
#: The field of InferTensorContents for each data type.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
#: How the elements of a raw tensor lie in memory, as numpy says it: little-endian.
_RAW = {
    "BOOL": "?",
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}
_HEAD = f"POST /{NAME}/ModelInfer HTTP/2.0\r\ncontent-type: application/json\r\n\r\n".encode()
_JSON = b"application/json"
#: Tensors of this size are converted in a few milliseconds.
_QUICK_BYTES = 65536


class OpenInference:
    """The methods of the service."""

    def __init__(self, plane: AsyncPlane, management: Management) -> None:
        self._plane = plane
        self._management = management

    def service(self, calls: Calls, name: str = NAME) -> list[Method]:
        """Returns the methods, for the server; ServerMetadata is not implemented.

        `name` is NAME or PROTOCOL_NAME.
        """
        return calls.service(
            name,
            Method("ServerLive", self.server_live, messages.ServerLiveRequest, messages.ServerLiveResponse),
            Method("ServerReady", self.server_ready, messages.ServerReadyRequest, messages.ServerReadyResponse),
            Method("ModelReady", self.model_ready, messages.ModelReadyRequest, messages.ModelReadyResponse),
            Method("ModelMetadata", self.model_metadata, messages.ModelMetadataRequest, messages.ModelMetadataResponse),
            Method("ModelInfer", self.model_infer, messages.ModelInferRequest, messages.ModelInferResponse),
        )

    async def server_live(self, request: Any, rpc: RpcCall) -> Any:
        """Always true: it answers."""
        return messages.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, rpc: RpcCall) -> Any:
        """Whether requests are welcome; whether a model is ready, ModelReady says."""
        return messages.ServerReadyResponse(ready=self._plane.routes.ready)

    async def model_ready(self, request: Any, rpc: RpcCall) -> Any:
        """Returns whether a version has as many ready workers as it should have at least; of a workflow all nodes."""
        workflow = None if request.version else self._plane.routes.workflow_ready(request.name)
        if workflow is not None:
            return messages.ModelReadyResponse(ready=workflow)
        (description,) = await self._describe(request.name, request.version or None, "name")
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return messages.ModelReadyResponse(ready=ready >= description["minWorkers"])

    async def model_metadata(self, request: Any, rpc: RpcCall) -> Any:
        """Returns the versions of a model; what its tensors look like is known to its handler alone."""
        if not request.version and self._plane.routes.workflow_ready(request.name) is not None:
            return messages.ModelMetadataResponse(name=request.name, versions=[DEFAULT_VERSION])
        if request.version:
            await self._describe(request.name, request.version, "model_name")
        versions = await self._describe(request.name, "all", "model_name")
        return messages.ModelMetadataResponse(
            name=request.name, versions=sorted(each["modelVersion"] for each in versions)
        )

    async def model_infer(self, request: Any, rpc: RpcCall) -> Any:
        """Answers a prediction."""
        if not request.model_name:
            raise bad_request("Parameter model_name is required.")
        target = self._plane.routes.named_target(request.model_name, request.model_version or None, 0)
        body = await _converted(request.ByteSize(), lambda: json.dumps(infer_body(request)).encode())
        rpc.trace = self._plane.begin_trace(target, _HEAD, rpc.metadata)
        call = self._plane.submit(target, _HEAD, [body], _JSON, rpc.trace)
        try:
            answer = await call.whole()
        finally:
            call.close()
        return await _converted(len(answer), lambda: infer_response(answer))

    async def _describe(self, name: str, version: str | None, parameter: str) -> list[dict[str, Any]]:
        """Returns what the supervisor says of a version, or of all.

        Raises:
            Failure: the name is empty (`parameter` says which argument that is), or there is no such model.
        """
        if not name:
            raise bad_request(f"Parameter {parameter} is required.")
        try:
            answer = await self._management.ask("describe_model", 60.0, model_name=name, version=version)
        except ServerError as error:
            raise management_failure(error) from error
        return list(answer["body"])


async def _converted(size: int, convert: Callable[[], Any]) -> Any:
    """Returns what `convert` returns; where it takes a while, other calls go on meanwhile."""
    return convert() if size <= _QUICK_BYTES else await asyncio.to_thread(convert)


def infer_body(request: Any) -> dict[str, Any]:
    """Returns a ModelInferRequest as the JSON of the REST protocol; BYTES are base64.

    Raises:
        Failure: a raw tensor is not what its data type says.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise _invalid(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    inputs = []
    for number, tensor in enumerate(request.inputs):
        entry = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        field = _CONTENTS.get(tensor.datatype)
        if raw:
            entry["data"] = _from_raw(tensor.name, tensor.datatype, raw[number])
        elif field is not None:
            data = list(getattr(tensor.contents, field))
            entry["data"] = [_base64(each) for each in data] if tensor.datatype == "BYTES" else data
        inputs.append(entry)
    return {"id": request.id, "model_name": request.model_name, "inputs": inputs}


def infer_response(answer: bytes) -> Any:
    """Returns a handler's JSON as a ModelInferResponse.

    Raises:
        Failure: it is no such answer.
    """
    try:
        fields = json.loads(answer)
        response = messages.ModelInferResponse(
            id=str(fields.get("id") or ""),
            model_name=str(fields["model_name"]),
            model_version=str(fields.get("model_version") or ""),
        )
        for output in fields["outputs"]:
            tensor = response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
            _set_contents(tensor, output["data"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        text = f"The handler's answer is none of the open inference protocol: {type(error).__name__}: {error}"
        raise Failure(StatusCode.INTERNAL, text, "org.pytorch.serve.http.InternalServerException") from error
    return response


def _set_contents(tensor: Any, data: list[Any]) -> None:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise ValueError(f"datatype {tensor.datatype!r} of output {tensor.name!r}")
    if tensor.datatype == "BYTES":  # the JSON text of each element, as in TorchServe
        data = [json.dumps(each, ensure_ascii=False).encode() for each in data]
    contents: Message = tensor.contents
    contents.SetInParent()
    getattr(contents, field).extend(data)


def _from_raw(name: str, datatype: str, raw: bytes) -> list[Any]:
    if datatype == "BYTES":
        return _bytes_elements(name, raw)
    kind = _RAW.get(datatype)
    if kind is None:
        raise _invalid(f"input {name!r} has the unknown datatype {datatype!r}")
    # Only here: most processes never see a tensor, and it takes an eighth of a second.
    import numpy as np

    try:
        elements: list[Any] = np.frombuffer(raw, dtype=kind).tolist()
    except ValueError as error:
        raise _invalid(f"the raw contents of input {name!r} are no {datatype} tensor: {error}") from error
    return elements


def _bytes_elements(name: str, raw: bytes) -> list[str]:
    """Elements of a raw BYTES tensor: each has its length before it, in four bytes."""
    elements = []
    start = 0
    while start < len(raw):
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        if start + 4 > len(raw) or end > len(raw):
            raise _invalid(f"the raw contents of input {name!r} are no BYTES tensor")
        elements.append(_base64(raw[start + 4 : end]))
        start = end
    return elements


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _invalid(message: str) -> Failure:
    return Failure(StatusCode.INVALID_ARGUMENT, message, "org.pytorch.serve.http.BadRequestException")
