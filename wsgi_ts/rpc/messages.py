"""The message classes of the gRPC APIs, made from `protos/descriptors.binpb` (see the package's text)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTOS = Path(__file__).parent / "protos"

INFERENCE = "org.pytorch.serve.grpc.inference"
MANAGEMENT = "org.pytorch.serve.grpc.management"
OPEN_INFERENCE = "org.pytorch.serve.grpc.openinference"
HEALTH = "grpc.health.v1"
ORCA = "xds.data.orca.v3"


def _load() -> descriptor_pool.DescriptorPool:
    """All descriptors, in a pool of their own: what else this process imports may declare the same names."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString((PROTOS / "descriptors.binpb").read_bytes()).file:
        pool.Add(file)
    return pool


_POOL = _load()


def _message(package: str, name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{package}.{name}"))


HealthCheckRequest = _message(HEALTH, "HealthCheckRequest")
HealthCheckResponse = _message(HEALTH, "HealthCheckResponse")

Empty = _message("google.protobuf", "Empty")
Status = _message("google.rpc", "Status")
ErrorInfo = _message("google.rpc", "ErrorInfo")

PredictionsRequest = _message(INFERENCE, "PredictionsRequest")
PredictionResponse = _message(INFERENCE, "PredictionResponse")
TorchServeHealthResponse = _message(INFERENCE, "TorchServeHealthResponse")

ManagementResponse = _message(MANAGEMENT, "ManagementResponse")
DescribeModelRequest = _message(MANAGEMENT, "DescribeModelRequest")
ListModelsRequest = _message(MANAGEMENT, "ListModelsRequest")
RegisterModelRequest = _message(MANAGEMENT, "RegisterModelRequest")
ScaleWorkerRequest = _message(MANAGEMENT, "ScaleWorkerRequest")
SetDefaultRequest = _message(MANAGEMENT, "SetDefaultRequest")
UnregisterModelRequest = _message(MANAGEMENT, "UnregisterModelRequest")

ServerLiveRequest = _message(OPEN_INFERENCE, "ServerLiveRequest")
ServerLiveResponse = _message(OPEN_INFERENCE, "ServerLiveResponse")
ServerReadyRequest = _message(OPEN_INFERENCE, "ServerReadyRequest")
ServerReadyResponse = _message(OPEN_INFERENCE, "ServerReadyResponse")
ModelReadyRequest = _message(OPEN_INFERENCE, "ModelReadyRequest")
ModelReadyResponse = _message(OPEN_INFERENCE, "ModelReadyResponse")
ModelMetadataRequest = _message(OPEN_INFERENCE, "ModelMetadataRequest")
ModelMetadataResponse = _message(OPEN_INFERENCE, "ModelMetadataResponse")
ModelInferRequest = _message(OPEN_INFERENCE, "ModelInferRequest")
ModelInferResponse = _message(OPEN_INFERENCE, "ModelInferResponse")
RepositoryIndexRequest = _message(OPEN_INFERENCE, "RepositoryIndexRequest")
RepositoryIndexResponse = _message(OPEN_INFERENCE, "RepositoryIndexResponse")
RepositoryModelLoadRequest = _message(OPEN_INFERENCE, "RepositoryModelLoadRequest")
RepositoryModelLoadResponse = _message(OPEN_INFERENCE, "RepositoryModelLoadResponse")
RepositoryModelUnloadRequest = _message(OPEN_INFERENCE, "RepositoryModelUnloadRequest")
RepositoryModelUnloadResponse = _message(OPEN_INFERENCE, "RepositoryModelUnloadResponse")

OrcaLoadReport = _message(ORCA, "OrcaLoadReport")
