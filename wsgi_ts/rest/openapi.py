"""The OpenAPI 3.0.1 documents: one for each connector, and one for each model.

A document is built from the tables below: one row for an operation, with TorchServe's names for those it describes.
What every operation may answer because HTTP itself was misused (a head too large, a body that does not arrive) stands
under "4XX".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.models.arguments import LOAD_PARAMETERS, MAX_PAGE, MODEL_NAME, RegisterArguments, ScaleArguments
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.rest import schemas
from wsgi_ts.rest.openapi_plugins import with_endpoints
from wsgi_ts.rest.schemas import Schema
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.kinds import FLAG, INT32, TEXT
from wsgi_ts.settings.table import Setting, settings_of
from wsgi_ts.tracing.store import DEFAULT_LIMIT
from wsgi_ts.workflows.arguments import WorkflowArguments

INFO = {
    "title": "TorchServe APIs",
    "description": "TorchServe is a flexible and easy to use tool for serving deep learning models",
    "version": TORCHSERVE_VERSION,
}

_JSON = "application/json"
_TEXT = "text/plain"
#: Routes that run a model, and "any method" of others; HEAD is GET without the body.
_ANY_METHOD = ("get", "post", "put", "delete", "patch")


def _arguments(**rows: Setting) -> tuple[Schema, ...]:
    return tuple(schemas.argument(name, row) for name, row in rows.items())


_REGISTER = _arguments(**settings_of(RegisterArguments))
_SCALE = _arguments(**settings_of(ScaleArguments))
_PAGE = _arguments(
    limit=Setting(INT32, MAX_PAGE, f"Number of entries to return, at most {MAX_PAGE}."),
    next_page_token=Setting(INT32, 0, "The nextPageToken of the answer before."),
)
_DESCRIBE = _arguments(customized=Setting(FLAG, False, "Whether to ask the handler to describe itself."))
_INVOKE = _arguments(
    model_name=Setting(
        TEXT,
        None,
        "The model; may be left out where one was loaded at startup or a form names it.",
        limits={"pattern": MODEL_NAME},
    )
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One row: a method on a path, what it is for, what it takes and what it may answer.

    `answers` maps statuses to descriptions; those from 400 on carry the error object, unless they are among
    `not_errors`, the others `result`, a component's name ("" for a body of no known type). `any_status` says that a
    handler may answer with every status. `scope` is the key that the operation takes where tokens are asked for.
    """

    path: str
    method: str
    name: str
    description: str
    answers: dict[int, str]
    not_errors: tuple[int, ...] = ()
    result: str = "Status"
    query: tuple[Schema, ...] = ()
    required: tuple[str, ...] = ()
    bodies: dict[str, Schema] | None = None
    answer_type: str = _JSON
    any_status: bool = False
    scope: str | None = None


_V1_READY = Operation("/v1/models/{model_name}", "get", "kserveReady", "Asks whether a model is ready.", {})
_DOCUMENT = {200: "The OpenAPI document of this connector."}
_NO_MODEL = {404: "No such model or version."}
_PREDICTION = {
    200: "The model's answer; it has a content type only where the handler sets one.",
    400: "A body that is not what its content type says.",
    **_NO_MODEL,
    408: "Not answered within the model's clientTimeoutInMills.",
    500: "The worker died or did not answer in time.",
    503: "No worker, a full queue, or a handler that failed.",
    507: "Out of memory.",
}
_NO_WORKFLOW = {404: "No such workflow."}
_WALK = {
    200: "The answer of the last node, or an object with those of all last nodes.",
    **_NO_WORKFLOW,
    408: "Not finished in the time that x-request-timeout-ms of the request gives, or the options of the workflow.",
    500: "A node has failed in all its attempts.",
    503: "A node has no worker, or a full queue.",
    507: "Out of memory.",
}
_CHANGE = {200: "Done.", 202: "Under way.", 400: "A wrong argument."}
_FAILED = {500: "A worker failed to start.", 507: "A worker failed to start for lack of memory."}


def _any_method(operation: Operation) -> list[Operation]:
    """The same operation with all methods; the name is that of the row's own one."""
    others = [method for method in _ANY_METHOD if method != operation.method]
    more = [replace(operation, method=method, name=f"{operation.name}_{method}") for method in others]
    return [operation, *more]


def _shared_operations() -> list[Operation]:
    describe = Operation("/", "options", "apiDescription", "Describes this connector.", _DOCUMENT, result="OpenApi")
    page = Operation(
        "/api-description", "get", "api-description", "Describes this connector.", _DOCUMENT, result="OpenApi"
    )
    return [describe, *_any_method(page)]


def _prediction(path: str, name: str, query: tuple[Schema, ...] = ()) -> list[Operation]:
    row = Operation(path, "post", name, "Runs the model on one input.", _PREDICTION, result="", query=query)
    required = tuple(argument["name"] for argument in query)
    return _any_method(replace(row, bodies=schemas.INPUTS, required=required, any_status=True, scope="inference"))


def _probe(path: str, name: str, meaning: str, result: str) -> list[Operation]:
    answers = {200: meaning} if result == "OipLive" else {200: meaning, 503: "Not so (yet, or any more)."}
    return _any_method(Operation(path, "get", name, meaning, answers, (503,), result=result))


def _inference_operations(config: Config) -> list[Operation]:
    health = {200: "Every model has the workers it should have.", 500: "Some model has too few workers."}
    ping = Operation("/ping", "get", "ping", "Says whether the server is healthy.", health, (500,), scope="inference")
    rows = [
        *_any_method(ping),
        *_probe("/livez", "live", "The server answers.", "OipLive"),
        *_probe("/readyz", "ready", "Requests are welcome.", "OipReady"),
        *_probe("/startupz", "started", "The models of the start are loaded.", "Started"),
        *_prediction("/predictions/{model_name}", "predictions"),
        *_prediction("/predictions/{model_name}/{model_version}", "version_predictions"),
        *_prediction("/predictions/{model_name}/{model_version}/{rest}", "version_predictions_rest"),
        *_prediction("/explanations/{model_name}", "explanations"),
        *_prediction("/explanations/{model_name}/{model_version}", "version_explanations"),
        *_prediction("/v1/models/{model_name}:predict", "predictionsV1"),
        *_prediction("/v1/models/{model_name}:explain", "explanationsV1"),
        *_prediction("/v2/models/{model_name}/infer", "predictionsV2"),
        *_prediction("/v2/models/{model_name}/explain", "explanationsV2"),
        *_prediction("/invocations", "invocations", _INVOKE),
        *_prediction("/models/{model_name}/invoke", "invoke"),
        *_prediction("/{model_name}/predict", "legacy_predict"),
        *_prediction("/{model_name}/{model_version}/predict", "version_legacy_predict"),
    ]
    workflow = Operation(
        "/wfpredict/{workflow_name}", "post", "workflow_predict", "Runs a workflow on one input.", _WALK, result=""
    )
    rows += _any_method(replace(workflow, bodies=schemas.INPUTS, scope="inference"))
    return rows + (_open_inference_operations() if config.ts_open_inference_protocol else [])


def _open_inference_operations() -> list[Operation]:
    def row(path: str, name: str, description: str, result: str) -> Operation:
        return Operation(path, "get", name, description, {200: description}, result=result, scope="inference")

    ready = {200: "A worker of the default version is ready.", **_NO_MODEL, 503: "None is."}
    server_ready = row("/v2/health/ready", "oipReady", "Requests are welcome.", "OipReady")
    model = row("/v2/models/{model_name}", "oipModel", "The model's versions.", "OipModel")
    model_ready = row("/v2/models/{model_name}/ready", "oipModelReady", "Whether the model is ready.", "OipModelReady")
    return [
        *_any_method(row("/v2", "oipServer", "The server's name and version.", "OipServer")),
        *_any_method(row("/v2/health/live", "oipLive", "The server answers.", "OipLive")),
        *_any_method(replace(server_ready, answers=server_ready.answers | {503: "Not now."}, not_errors=(503,))),
        replace(model, answers=model.answers | _NO_MODEL),
        replace(model_ready, answers=ready, not_errors=(503,)),
    ]


def _version_operations(path: str, prefix: str) -> list[Operation]:
    """What can be done with one version, or with the default one."""
    removed = {200: "Unregistered.", 403: "Default of several versions.", **_NO_MODEL, 408: "Timed out."}
    described = {200: "The model's settings and workers.", **_NO_MODEL}
    asked = {500: "The handler did not describe itself.", 503: "No worker to describe the model."}
    again = {206: "Some of the workers that were there before are being started again."}
    change = {**_CHANGE, **again, **_NO_MODEL, **_FAILED}
    name = f"{prefix}describeModel"
    return [
        Operation(path, "get", name, "Describes a model.", described | asked, result="Models", query=_DESCRIBE),
        Operation(path, "put", f"{prefix}setAutoScale", "Sets the number of workers.", change, query=_SCALE),
        Operation(path, "delete", f"{prefix}unregisterModel", "Unregisters a model.", removed),
        Operation(path, "options", f"{prefix}modelApi", "Describes the model's API.", described, result="OpenApi"),
    ]


def _workflow_operations() -> list[Operation]:
    registered = {200: "Registered.", 400: "A wrong argument, or specification.", 404: "No such archive."}
    registered |= {409: "Already registered.", 500: "A node could not be registered; none of them is left."}
    arguments = _arguments(**settings_of(WorkflowArguments))
    body = {_JSON: {"schema": schemas.json_arguments(arguments, required=("url",))}}
    text = "Registers a workflow with all its nodes."
    register = Operation("/workflows", "post", "registerWorkflow", text, registered, query=arguments, bodies=body)
    listed, described = {200: "The workflows."}, {200: "The workflow's numbers and graph.", **_NO_WORKFLOW}
    removed = {200: "Unregistered.", **_NO_WORKFLOW, 500: "A node was gone already."}
    one, about = "/workflows/{workflow_name}", "Describes a workflow."
    return [
        Operation("/workflows", "get", "listWorkflows", "Lists workflows.", listed, result="WorkflowList", query=_PAGE),
        replace(register, required=("url",)),
        Operation(one, "get", "describeWorkflow", about, described, result="Workflows"),
        Operation(one, "delete", "unregisterWorkflow", "Unregisters a workflow.", removed),
    ]


def _repository_operations() -> list[Operation]:
    index = Operation("/v2/repository/index", "post", "repositoryIndex", "Lists the models.", {200: "All of them."})
    ready = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    known = schemas.json_arguments(_arguments(**LOAD_PARAMETERS), required=())
    del known["required"]  # an empty list is none
    parameters = {"type": "object", "properties": {"parameters": {**known, "additionalProperties": False}}}
    answers = {200: "Done.", 400: "A wrong parameter.", **_NO_MODEL, 405: "Only with enable_model_api=true.", **_FAILED}
    path = "/v2/repository/models/{model_name}"
    load = Operation(f"{path}/load", "post", "repositoryLoad", "Loads a model of the store.", answers, result="OipLoad")
    unload = Operation(f"{path}/unload", "post", "repositoryUnload", "Unloads a model.", answers, result="OipUnload")
    return [
        replace(index, answers=index.answers | {400: "A wrong body."}, result="OipIndex", bodies=_json_body(ready)),
        replace(load, bodies=_json_body(parameters)),
        replace(unload, answers=answers | {403: "The default version cannot go.", 408: "Timed out."}),
    ]


def _trace_operations() -> list[Operation]:
    query = _arguments(
        model=Setting(TEXT, None, "Only requests of this model, or workflow."),
        status=Setting(TEXT, None, "Only those kept for this reason.", limits={"enum": ["slow", "failed", "sampled"]}),
        limit=Setting(INT32, DEFAULT_LIMIT, "Number of entries to return."),
    )
    listed = {200: "The requests, the newest first.", 400: "Another status."}
    found = {200: "The request.", 404: "Nothing is kept of it."}
    path, about = "/debug/traces", "Lists the last slow, failed and sampled requests."
    return [
        Operation(path, "get", "listTraces", about, listed, result="Traces", query=query),
        Operation(f"{path}/{{request_id}}", "get", "describeTrace", "Tells of one of them.", found, result="Trace"),
    ]


def _json_body(schema: Schema) -> dict[str, Schema]:
    return {_JSON: {"schema": schema}}


def _one_model_operations() -> list[Operation]:
    """What can be done with one model at the management API."""
    default_path = "/models/{model_name}/{model_version}/set-default"
    return [
        *_version_operations("/models/{model_name}", ""),
        *_version_operations("/models/{model_name}/{model_version}", "version_"),
        Operation(default_path, "put", "setDefault", "Sets the default version.", {200: "Done.", **_NO_MODEL}),
    ]


def _management_operations(config: Config) -> list[Operation]:
    listed = {200: "The models."}
    registered = {**_CHANGE, 404: "No such archive.", 409: "Already registered.", **_FAILED}
    text = (
        "Registers a model. With a JSON body the arguments are taken from there, and those of the query string are not "
        "looked at."
    )
    body = {_JSON: {"schema": schemas.json_arguments(_REGISTER, required=("url",))}}
    register = Operation("/models", "post", "registerModel", text, registered, query=_REGISTER, required=("url",))
    operations = [
        Operation("/models", "get", "listModels", "Lists the models.", listed, result="ModelList", query=_PAGE),
        replace(register, bodies=body),
        *_one_model_operations(),
        replace(_V1_READY, answers={200: "Whether the model has workers.", **_NO_MODEL}, result="Ready"),
        Operation("/plugins", "get", "listPlugins", "Lists the plugins.", {200: "The plugins."}, result="Plugins"),
        *_trace_operations(),
        *_workflow_operations(),
        *(_repository_operations() if config.ts_open_inference_protocol else []),
    ]
    operations = [replace(operation, scope="management") for operation in operations]
    if not config.enable_model_api:
        unsupported = {405: "Only with enable_model_api=true."}
        operations = [
            replace(each, answers=each.answers | unsupported) if each.name.endswith("gisterModel") else each
            for each in operations
        ]
    if config.token_authorization:
        scopes = {"enum": ["management", "inference"]}
        kind = schemas.argument("type", Setting(TEXT, None, "Whose key is renewed.", limits=scopes))
        renewed = {200: "The new key is in key_file.json.", 400: "Another type, or not the API key."}
        renew = Operation("/token", "get", "renewToken", "Renews a key.", renewed, result="Bytes")
        operations += _any_method(replace(renew, query=(kind,), required=("type",), scope="API"))
    return operations


def _metrics_operations() -> list[Operation]:
    names = schemas.parameter(
        "query", "name[]", {"type": "array", "items": {"type": "string"}}, "Only metrics of these names."
    )
    answers = {200: "The metrics, in Prometheus' text format; empty where metrics_mode is log."}
    metrics = Operation("/metrics", "get", "metrics", "Reads the metrics.", answers, result="Bytes")
    return _any_method(replace(metrics, query=(names,), answer_type=_TEXT))


def document(kinds: Collection[str], config: Config) -> dict[str, Any]:
    """The document of a connector that serves these kinds of APIs; some routes exist only under a setting."""
    operations = _shared_operations()
    if "inference" in kinds:
        operations += _inference_operations(config)
    if config.serves_kserve and "inference" in kinds and "management" not in kinds:
        answers = {200: "A worker of the default version is ready.", **_NO_MODEL, 503: "None is."}
        operations.append(replace(_V1_READY, answers=answers, not_errors=(503,), result="Ready", scope="inference"))
    if "management" in kinds:
        operations += _management_operations(config)
    made = _assemble([*operations, *_metrics_operations()], config)
    if "metrics" not in kinds:  # described here as TorchServe does, answered by a listener of its own
        made["paths"]["/metrics"]["servers"] = [{"url": str(config.metrics_address)}]
    made["paths"] = with_endpoints(made["paths"], kinds, config)
    return made


def model_document(model_name: str, model_version: str | None) -> dict[str, Any]:
    """The document of one model at the inference API, None: of its default version: how to ask for a prediction."""
    if model_version is not None:
        rows = _prediction(f"/predictions/{model_name}/{model_version}", "version_predictions")
    else:
        rows = [
            *_prediction(f"/predictions/{model_name}", "predictions"),
            *_prediction(f"/v1/models/{model_name}:predict", "predictionsV1"),
            *_prediction(f"/v2/models/{model_name}/infer", "predictionsV2"),
        ]
    return {**_assemble(rows, None), "info": {"title": f"RESTful API for: {model_name}", "version": "1.0.0"}}


def model_management_document(model_name: str) -> dict[str, Any]:
    """The document of one model at the management API: what can be done with it and with its versions."""
    info = {"title": f"RESTful Management API for: {model_name}", "version": TORCHSERVE_VERSION}
    return {**_assemble(_one_model_operations(), None), "info": info}


def _assemble(operations: Iterable[Operation], config: Config | None) -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    with_tokens = config is not None and config.token_authorization
    for operation in operations:
        made = _operation_object(operation)
        if with_tokens and operation.scope is not None:
            made["security"] = [{operation.scope: []}]
        paths.setdefault(operation.path, {})[operation.method] = made
    components: dict[str, Any] = {"schemas": schemas.COMPONENTS, "headers": schemas.HEADERS}
    if with_tokens:
        components["securitySchemes"] = schemas.KEYS
    return {"openapi": "3.0.1", "info": INFO, "paths": paths, "components": components}


def _operation_object(operation: Operation) -> dict[str, Any]:
    parameters = [
        schemas.parameter("path", name, schemas.PATH_PART, schemas.PATH_TEXTS[name], required=True)
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    parameters += [{**row, "required": row["name"] in operation.required} for row in operation.query]
    made: dict[str, Any] = {"description": operation.description, "operationId": operation.name}
    made["parameters"] = parameters
    if operation.bodies is not None:
        made["requestBody"] = {"content": operation.bodies, "required": False}
    answers = {
        str(status): _answer_object(operation, status, text) for status, text in sorted(operation.answers.items())
    }
    answers["413"] = {"description": "The body is larger than max_request_size."}
    answers["4XX"] = _error("HTTP itself refuses the request, or the method is not one of this path.")
    if operation.any_status:
        answers["default"] = {"description": "A status that the handler has set, with the handler's body."}
    made["responses"] = answers
    return made


def _answer_object(operation: Operation, status: int, description: str) -> dict[str, Any]:
    if status >= 400 and status not in operation.not_errors:
        return _error(description)
    answer: dict[str, Any] = {"description": description, "headers": schemas.HEADER_LINKS}
    if operation.result:
        schema = {"$ref": f"#/components/schemas/{operation.result}"}
        answer["content"] = {operation.answer_type: {"schema": schema}}
    return answer


def _error(description: str) -> dict[str, Any]:
    content = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": description, "headers": schemas.HEADER_LINKS, "content": content}
