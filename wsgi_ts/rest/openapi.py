"""The OpenAPI 3.0.1 documents: one for each connector, and one for each model.

A document is built from the tables below: one row for an operation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION

INFO = {
    "title": "TorchServe APIs",
    "description": "TorchServe is a flexible and easy to use tool for serving deep learning models",
    "version": TORCHSERVE_VERSION,
}

_JSON = "application/json"
_ANY = "*/*"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"

#: (name, type, default or None, description) of the query parameters.
_Parameters = tuple[tuple[str, str, Any, str], ...]

_PAGE: _Parameters = (
    ("limit", "integer", 100, "Number of entries to return, at most 100."),
    ("next_page_token", "string", None, "The nextPageToken of the answer before."),
)
_REGISTER: _Parameters = (
    ("url", "string", None, "Where the archive is: a file of the model store or an allowed URL."),
    ("model_name", "string", None, "Name of the model; the archive's own by default."),
    ("handler", "string", None, "Handler to use instead of the archive's."),
    ("runtime", "string", None, "Runtime to use instead of the archive's."),
    ("batch_size", "integer", 1, "Most requests that one call of the handler gets."),
    ("max_batch_delay", "integer", 100, "Longest wait for a batch to fill, in milliseconds."),
    ("response_timeout", "integer", 120, "Longest run of the handler, in seconds."),
    ("startup_timeout", "integer", 120, "Longest start of a worker, in seconds."),
    ("initial_workers", "integer", 0, "Number of workers to start at once."),
    ("synchronous", "boolean", True, "Whether the answer waits for the workers."),
)
_SCALE: _Parameters = (
    ("min_worker", "integer", 1, "Least number of workers."),
    ("max_worker", "integer", None, "Most workers; min_worker by default."),
    ("synchronous", "boolean", False, "Whether the answer waits for the workers."),
)
_DESCRIBE: _Parameters = (("customized", "boolean", False, "Whether to ask the handler to describe itself."),)
_METRIC_NAMES: _Parameters = (("name[]", "string", None, "Only metrics of this name; may be repeated."),)


@dataclass(frozen=True, slots=True)
class Operation:
    """One row: a method on a path, what it is for, what it takes and what it may answer.

    `answers` maps statuses to descriptions; those from 400 on carry the error object.
    """

    path: str
    method: str
    name: str
    description: str
    answers: dict[int, str]
    query: _Parameters = ()
    takes_body: bool = False
    answer_type: str = _JSON


_DOCUMENT = {200: "The OpenAPI document of this connector."}
_PREDICTION = {
    200: "The model's answer.",
    404: "No such model or version.",
    500: "The worker died or did not answer in time.",
    503: "No worker, a full queue, or a handler that failed.",
    507: "Out of memory.",
}
_NO_MODEL = {404: "No such model or version."}
_CHANGE = {200: "Done.", 202: "Under way.", 400: "A wrong argument.", **_NO_MODEL, 500: "A worker failed."}


def _shared_operations() -> list[Operation]:
    return [
        Operation("/", "options", "apiDescription", "Describes this connector.", _DOCUMENT),
        Operation("/api-description", "get", "api-description", "Describes this connector.", _DOCUMENT),
    ]


def _prediction(path: str, name: str) -> Operation:
    return Operation(
        path, "post", name, "Runs the model on one input.", _PREDICTION, takes_body=True, answer_type=_ANY
    )


def _inference_operations() -> list[Operation]:
    health = {200: "Every model has the workers it should have.", 500: "Some model has too few workers."}
    return [
        Operation("/ping", "get", "ping", "Says whether the server is healthy.", health),
        _prediction("/v1/models/{model_name}:predict", "predictionsV1"),
        _prediction("/v2/models/{model_name}/infer", "predictionsV2"),
        _prediction("/predictions/{model_name}", "predictions"),
        _prediction("/predictions/{model_name}/{model_version}", "version_predictions"),
    ]


def _management_operations() -> list[Operation]:
    registered = {**_CHANGE, 404: "No such archive.", 409: "Already registered."}
    removed = {200: "Unregistered.", 403: "Default of several versions.", **_NO_MODEL, 408: "Timed out."}
    described = {200: "The model's settings and workers.", **_NO_MODEL}
    operations = [
        Operation("/models", "get", "listModels", "Lists the models.", {200: "The models."}, _PAGE),
        Operation("/models", "post", "registerModel", "Registers a model.", registered, _REGISTER),
    ]
    for path, prefix in (("/models/{model_name}", ""), ("/models/{model_name}/{model_version}", "version_")):
        operations += [
            Operation(path, "get", f"{prefix}describeModel", "Describes a model.", described, _DESCRIBE),
            Operation(path, "put", f"{prefix}setAutoScale", "Sets the number of workers.", _CHANGE, _SCALE),
            Operation(path, "delete", f"{prefix}unregisterModel", "Unregisters a model.", removed),
        ]
    default = {200: "Done.", **_NO_MODEL}
    path = "/models/{model_name}/{model_version}/set-default"
    return [*operations, Operation(path, "put", "setDefault", "Sets the default version.", default)]


def _metrics_operations() -> list[Operation]:
    answers = {200: "The metrics, in Prometheus' text format."}
    return [
        Operation(
            "/metrics", "get", "metrics", "Reads the metrics.", answers, _METRIC_NAMES, answer_type=_TEXT
        )
    ]


def document(kinds: Collection[str]) -> dict[str, Any]:
    """The document of a connector.

    Args:
        kinds: which of "inference", "management" and "metrics" it serves.
    """
    operations: list[Operation] = []
    if "inference" in kinds or "management" in kinds:
        operations += _shared_operations()
    if "inference" in kinds:
        operations += _inference_operations()
    if "management" in kinds:
        operations += _management_operations()
    return _assemble([*operations, *_metrics_operations()])


def model_document(model_name: str, model_version: str | None) -> dict[str, Any]:
    """The document of one model: how to ask it for a prediction.

    Args:
        model_name: a registered model.
        model_version: the version the caller named, None for the default one.
    """
    version = "" if model_version is None else f"/{model_version}"
    return _assemble([_prediction(f"/predictions/{model_name}{version}", "predictions")])


def _assemble(operations: Iterable[Operation]) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation_object(operation)
    return {"openapi": "3.0.1", "info": INFO, "paths": paths}


def _operation_object(operation: Operation) -> dict[str, Any]:
    parameters = [
        {"in": "path", "name": name, "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    parameters += [_query_parameter(*row) for row in operation.query]
    rest: dict[str, Any] = {}
    if operation.takes_body:
        schema = {"type": "string", "format": "binary"}
        rest["requestBody"] = {"content": {_ANY: {"schema": schema}}, "required": True}
    rest["responses"] = {
        str(status): _answer_object(status, text, operation.answer_type)
        for status, text in operation.answers.items()
    }
    head = {"description": operation.description, "operationId": operation.name, "parameters": parameters}
    return {**head, **rest}


def _query_parameter(name: str, kind: str, default: Any, description: str) -> dict[str, Any]:
    schema = {"type": kind} if default is None else {"type": kind, "default": default}
    required = name == "url"
    return {"in": "query", "name": name, "description": description, "required": required, "schema": schema}


def _answer_object(status: int, description: str, answer_type: str) -> dict[str, Any]:
    if status < 400:
        schema = {"type": "object"} if answer_type == _JSON else {"type": "string", "format": "binary"}
        return {"description": description, "content": {answer_type: {"schema": schema}}}
    fields = {
        "code": {"type": "integer", "description": "The status."},
        "type": {"type": "string", "description": "The kind of error."},
        "message": {"type": "string", "description": "What went wrong."},
    }
    error = {"type": "object", "required": list(fields), "properties": fields}
    return {"description": description, "content": {_JSON: {"schema": error}}}
