"""From the server's errors to gRPC's: status code and description."""

from __future__ import annotations

from wsgi_ts.errors import (
    InvalidKey,
    ModelNotFound,
    ModelVersionNotFound,
    ServerError,
    ServiceUnavailable,
)
from wsgi_ts.rpc.status import StatusCode

_OF_HTTP = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.ABORTED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    416: StatusCode.OUT_OF_RANGE,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
#: Where the management API has a better code than that of the HTTP status.
_OF_MANAGEMENT = {
    "ConflictStatusException": StatusCode.ALREADY_EXISTS,
    "InvalidModelVersionException": StatusCode.FAILED_PRECONDITION,
}
#: The second line of a description: TorchServe's class, which clients may look for.
_REASONS = {
    "ModelNotFoundException": "org.pytorch.serve.archive.model.ModelNotFoundException",
    "ModelVersionNotFoundException": "org.pytorch.serve.archive.model.ModelVersionNotFoundException",
    "InvalidModelException": "org.pytorch.serve.archive.model.InvalidModelException",
    "ModelException": "org.pytorch.serve.archive.model.ModelException",
    "DownloadArchiveException": "org.pytorch.serve.archive.DownloadArchiveException",
    "WorkerInitializationException": "org.pytorch.serve.wlm.WorkerInitializationException",
}
#: That of every error that a model worker answers with.
WORKER_REASON = "org.pytorch.serve.http.InternalServerException"


class Failure(Exception):
    """What a call ends with in place of an answer.

    Args:
        reason: TorchServe's class name; empty for none.
    """

    def __init__(self, code: StatusCode, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message.encode("utf-8", "replace").decode()
        self.reason = reason

    @property
    def description(self) -> str:
        """Message and reason as they stand in a status."""
        return f"{self.message}\n{self.reason}" if self.reason else self.message


def code_of(http_status: int) -> StatusCode:
    """The code for a status that a model worker, or the server, answers with over HTTP."""
    known = _OF_HTTP.get(http_status)
    if known is not None:
        return known
    hundreds = http_status // 100
    by_class = {2: StatusCode.OK, 4: StatusCode.FAILED_PRECONDITION, 5: StatusCode.INTERNAL}
    return by_class.get(hundreds, StatusCode.UNKNOWN)


def bad_request(message: str) -> Failure:
    """A request of the inference API that lacks something; INTERNAL as in TorchServe."""
    return Failure(StatusCode.INTERNAL, message, "BadRequestException.()")


def inference_failure(error: ServerError) -> Failure:
    """How the inference API reports an error."""
    if isinstance(error, InvalidKey):
        return Failure(StatusCode.PERMISSION_DENIED, error.message)
    if isinstance(error, (ModelNotFound, ModelVersionNotFound)):
        return Failure(StatusCode.INTERNAL, error.message, _REASONS[error.type_name])
    if isinstance(error, ServiceUnavailable):  # no worker, or the queue is full
        return Failure(StatusCode.INTERNAL, error.message, "InternalServerException.()")
    return Failure(code_of(error.status), error.message, WORKER_REASON)


def management_failure(error: ServerError) -> Failure:
    """How the management API reports an error."""
    if isinstance(error, InvalidKey):
        return Failure(StatusCode.PERMISSION_DENIED, error.message)
    name = error.type_name
    code = _OF_MANAGEMENT.get(name) or code_of(error.status)
    return Failure(code, error.message, _REASONS.get(name, f"org.pytorch.serve.http.{name}"))
