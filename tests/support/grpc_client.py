"""A gRPC client as users make it: modules generated from the .proto files, channels of grpcio."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_tools import protoc

from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess

PROTOS = REPOSITORY / "wsgi_ts" / "rpc" / "protos"
_FILES = (
    "inference.proto",
    "management.proto",
    "open_inference_grpc.proto",
    "health.proto",
    "google/rpc/status.proto",
    "google/rpc/error_details.proto",
    "xds/data/orca/v3/orca_load_report.proto",
)
_LIMIT = 256 << 20


def _generated(*names: str) -> Iterator[Any]:
    """The modules that protoc makes of the .proto files."""
    well_known = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory(prefix="wts-protos-") as folder:
        to = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
        assert protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *to, *_FILES]) == 0
        sys.path.append(folder)
        importlib.invalidate_caches()
        for name in names:
            yield importlib.import_module(name)
        sys.path.remove(folder)


(
    inference_pb2,
    inference_pb2_grpc,
    management_pb2,
    management_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    error_details_pb2,
    empty_pb2,
    orca_pb2,
) = _generated(
    "inference_pb2",
    "inference_pb2_grpc",
    "management_pb2",
    "management_pb2_grpc",
    "open_inference_grpc_pb2",
    "open_inference_grpc_pb2_grpc",
    "health_pb2",
    "health_pb2_grpc",
    "google.rpc.error_details_pb2",
    "google.protobuf.empty_pb2",
    "xds.data.orca.v3.orca_load_report_pb2",
)


class GrpcClient:
    """Stubs for both ports of a server; a context manager that closes their channels.

    Args:
        server: the server.
        roots: the certificates that the server is checked by; None: plain text.
        shown: the private key and the certificate that the client shows, as PEM.
        metadata: sent with every call of the methods below.
    """

    def __init__(
        self,
        server: ServerProcess,
        roots: bytes | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        shown: tuple[bytes | None, bytes | None] = (None, None),
    ) -> None:
        self.metadata = tuple(metadata)
        self._channels = [_channel(server.ports[f"grpc_{api}"], roots, shown) for api in ("inference", "management")]
        self.inference = inference_pb2_grpc.InferenceAPIsServiceStub(self._channels[0])
        self.open_inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channels[0])
        self.health = health_pb2_grpc.HealthStub(self._channels[0])
        self.repository = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channels[1])
        self.management = management_pb2_grpc.ManagementAPIsServiceStub(self._channels[1])

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            channel.close()

    def ping(self, timeout: float = 60.0) -> str:
        """The text of the health answer."""
        health: str = self.inference.Ping(empty_pb2.Empty(), timeout=timeout, metadata=self.metadata).health
        return health

    def predict(self, model: str, data: bytes = b"", timeout: float = 60.0, **fields: Any) -> bytes:
        """The answer to a request with one input, `data`, unless `input` gives others."""
        answer: bytes = self.inference.Predictions(
            request(model, data, **fields), timeout=timeout, metadata=self.metadata
        ).prediction
        return answer

    def stream(self, model: str, data: bytes = b"", timeout: float = 60.0, **fields: Any) -> Any:
        """The call of a streamed prediction, which is iterated over."""
        return self.inference.StreamPredictions(request(model, data, **fields), timeout=timeout, metadata=self.metadata)

    def manage(self, method: str, message: Any) -> str:
        """The text that a method of the management API answers with."""
        answer: str = getattr(self.management, method)(message, timeout=300.0, metadata=self.metadata).msg
        return answer


def request(model: str, data: bytes = b"", **fields: Any) -> Any:
    """A PredictionsRequest."""
    return inference_pb2.PredictionsRequest(model_name=model, **{"input": {"data": data}, **fields})


def _channel(port: int, roots: bytes | None, shown: tuple[bytes | None, bytes | None]) -> grpc.Channel:
    options = [
        ("grpc.max_send_message_length", _LIMIT),
        ("grpc.max_receive_message_length", _LIMIT),
        # Each client has connections of its own.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    if roots is None:
        return grpc.insecure_channel(f"127.0.0.1:{port}", options)
    return grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(roots, *shown), options)


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Code and description of a call that fails."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    raise AssertionError(f"an answer in place of an error: {answer!r}")


def held(client: GrpcClient, folder: Path, timeout: float = 120.0) -> tuple[Any, Path]:
    """A call of the model `seen` whose handler is at work by now.

    Args:
        client: the client.
        folder: for the files of this call; one that has no others.
        timeout: the client's deadline.

    Returns:
        The call, and the file that ends it once it is there.
    """
    begun, gate = folder / "begun", folder / "gate"
    fields = {"gate": str(gate).encode(), "begun": str(begun).encode()}
    call = client.inference.Predictions.future(request("seen", input=fields), timeout=timeout)
    eventually(begun.exists, within=20, what="the handler at work")
    return call, gate
