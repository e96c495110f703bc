"""Every error a client can see: HTTP status, TorchServe's type name and text.

Raised anywhere, turned into a response only in `wsgi_ts.rest` (and `wsgi_ts.rpc`). The message is shown to the client:
it never carries a path, a traceback or the name of a shared-memory object.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServerError(Exception):
    """An error with an HTTP status and TorchServe's exception name; the base of all errors below.

    Args:
        message: the text of the answer's `message` field.
        status, type_name: override the class's HTTP status and `type` field, which its head names.
    """

    http_status: ClassVar[int] = 500
    default_type: ClassVar[str] = "InternalServerException"
    #: When the client may try again, in seconds, as the answer's Retry-After; 0 where that is not said.
    retry_after_s: int = 0

    def __init_subclass__(cls, status: int | None = None, type_name: str | None = None) -> None:
        cls.http_status = status or cls.http_status
        cls.default_type = type_name or cls.default_type

    def __init__(self, message: str, *, status: int | None = None, type_name: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = self.http_status if status is None else status
        self.type_name = self.default_type if type_name is None else type_name

    def to_dict(self) -> dict[str, Any]:
        """The answer's JSON body, in TorchServe's field order."""
        return {"code": self.status, "type": self.type_name, "message": self.message}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ServerError:
        """The same error, on the other side of the control socket."""
        return ServerError(fields["message"], status=fields["code"], type_name=fields["type"])


class InternalServerError(ServerError):
    """Something failed inside the server or the handler."""


class WorkerInitializationError(ServerError, type_name="WorkerInitializationException"):
    """A model worker could not be placed or started."""


class ResourceNotFound(ServerError, status=404, type_name="ResourceNotFoundException"):
    """No such path."""

    def __init__(self) -> None:
        super().__init__("Requested resource is not found, please refer to API document.")


class MethodNotAllowed(ServerError, status=405, type_name="MethodNotAllowedException"):
    """The path exists, but not with this method."""

    def __init__(self) -> None:
        super().__init__("Requested method is not allowed, please refer to API document.")


class ModelNotFound(ServerError, status=404, type_name="ModelNotFoundException"):
    """No such model, or no such archive."""

    @classmethod
    def named(cls, model_name: str) -> ModelNotFound:
        """The error for a model name that is not registered."""
        return cls(f"Model not found: {model_name}")


class ModelVersionNotFound(ServerError, status=404, type_name="ModelVersionNotFoundException"):
    """The model exists, but not this version of it."""

    @classmethod
    def named(cls, model_name: str, version: str) -> ModelVersionNotFound:
        """The error for a version that is not registered."""
        return cls(f"Model version: {version} does not exist for model: {model_name}")


class WorkflowNotFound(ServerError, status=404, type_name="WorkflowNotFoundException"):
    """No such workflow."""


class InvalidWorkflow(ServerError, type_name="InvalidWorkflowException"):
    """The archive is no workflow archive (500, as by TorchServe), or not a safe or sound one (400)."""


class InvalidDag(ServerError, status=400, type_name="InvalidDAGException"):
    """The specification of a workflow is wrong.

    `where` is file and line ("spec.yaml:12") where `message` does not say it, for `wsgi-ts workflow check`.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


class BadRequest(ServerError, status=400, type_name="BadRequestException"):
    """The request itself is wrong."""


class InvalidModel(ServerError, status=400, type_name="InvalidModelException"):
    """The archive is not a model archive, or not a safe one."""


class InvalidKey(ServerError, status=400, type_name="InvalidKeyException"):
    """The request's token is missing, wrong or expired."""

    def __init__(self, action: str = "Authorization") -> None:
        super().__init__(f"Token {action} failed. Token either incorrect, expired, or not provided correctly")


class HostNotAllowed(ServerError, status=403, type_name="HostNotAllowedException"):
    """A request for another host than this one, at an API that asks for no token."""

    def __init__(self) -> None:
        super().__init__(
            "The Host header must be localhost, a loopback address or the name in management_address; "
            "with token authorization any name is accepted."
        )


class CrossSiteRequest(ServerError, status=403, type_name="CrossSiteRequestException"):
    """A browser sends a request that would change something for a page of another site; no token was asked for."""

    def __init__(self) -> None:
        super().__init__(
            "A page of another site may not change anything here: set cors_allowed_origin to its origin to let it, or "
            "switch token authorization on."
        )


class ModelFailed(ServerError, status=400, type_name="ModelException"):
    """What the model needs could not be set up: its Python environment or the packages in it."""


class DownloadFailed(ServerError, status=400, type_name="DownloadArchiveException"):
    """The archive could not be fetched."""


class InvalidModelVersion(ServerError, status=403, type_name="InvalidModelVersionException"):
    """The version cannot be removed (it is the default one)."""


class RequestTimeout(ServerError, status=408, type_name="RequestTimeoutException"):
    """The request's own deadline has passed."""


class ConflictStatus(ServerError, status=409, type_name="ConflictStatusException"):
    """Already registered."""


class PayloadTooLarge(ServerError, status=413, type_name="RequestEntityTooLargeException"):
    """The body is larger than `max_request_size`: answered with an empty body, as TorchServe does."""


class ServiceUnavailable(ServerError, status=503, type_name="ServiceUnavailableException"):
    """No worker, the queue is full, or too much is under way."""

    @classmethod
    def no_worker(cls, model_name: str, version: str | None) -> ServiceUnavailable:
        """TorchServe's one text for no worker, a full queue and a refused sequence (unbalanced quote included)."""
        versioned = "" if version is None else f' Version {version}"'
        return cls(
            f'Model "{model_name}"{versioned} has no worker to serve inference request. Please use scale workers API '
            "to add workers. If this is a sequence inference, please check if it is closed, or expired; or exceeds "
            "maxSequenceJobQueueSize"
        )

    @classmethod
    def busy_node(cls, model_name: str) -> ServiceUnavailable:
        """The node of a workflow that this model is has no worker, or a full queue; TorchServe answers 500 here."""
        error = cls.no_worker(model_name, None)
        error.retry_after_s = 1
        return error

    @classmethod
    def no_slot(cls, model_name: str, version: str | None) -> ServiceUnavailable:
        """The model has workers, but the process that took the request has no slot left for it; the text is ours."""
        versioned = "" if version is None else f" version {version}"
        return cls(
            f'Model "{model_name}"{versioned} has as many requests under way as this server takes for one model '
            "(see slots_per_worker). Please try again in a few seconds."
        )


class OutOfResources(ServerError, status=507):
    """Memory, /dev/shm or GPU memory is used up."""


def handler_error(status: int, text: str) -> ServerError:
    """What the error of a handler is told as: its own status and text, and a type that follows the status."""
    for kind in (RequestTimeout, BadRequest):
        if status == kind.http_status:
            return kind(text)
    return InternalServerError(text, status=status)
