"""The schemas of the OpenAPI documents: arguments, bodies, headers and keys."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from wsgi_ts.settings.table import Setting

Schema = dict[str, Any]

BINARY: Schema = {"type": "string", "format": "binary"}
#: A model takes a body of any type; these are the ones that are not handed to it as they are, and the one that is.
INPUTS: dict[str, Schema] = {
    "application/octet-stream": {"schema": BINARY},
    "application/json": {"schema": {"description": "Anything; at most 100 levels deep."}},
    "text/plain": {"schema": {"type": "string"}},
    "application/x-www-form-urlencoded": {
        "schema": {"type": "object", "maxProperties": 1000, "additionalProperties": {"type": "string"}}
    },
    "multipart/form-data": {"schema": {"type": "object", "maxProperties": 1000, "additionalProperties": BINARY}},
}

#: A part of a path, and what it is by its name in the template.
PATH_PART: Schema = {"type": "string", "minLength": 1}
PATH_TEXTS = {
    "model_name": "Name of a registered model.",
    "model_version": "One of its versions.",
    "workflow_name": "Name of a workflow.",
    "request_id": "From the header x-request-id of an answer.",
    "rest": "Told to the handler as header url_path; may have slashes.",
}


def parameter(place: str, name: str, schema: Schema, description: str, *, required: bool = False) -> Schema:
    """A parameter object.

    `place` is "path" or "query".
    """
    return {"in": place, "name": name, "description": description, "required": required, "schema": schema}


_INT32: Schema = {"minimum": -(2**31), "maximum": 2**31 - 1}


def argument(name: str, row: Setting) -> Schema:
    """A query argument as TorchServe reads it: text that is no number counts as absent, all but "true" as false."""
    kind, description = row.kind.json_type, row.help
    schema: Schema = {"type": kind, **(_INT32 if kind == "integer" else {}), **row.limits}
    if kind != "string":
        schema = {"anyOf": [schema, {"type": "string", "pattern": "^[^0-9+-]*$"}]}
    if row.default is not None:
        schema["default"] = row.default
    if kind == "integer":
        description += " Text that is no number counts as absent."
    elif kind == "boolean":
        description += " Every text but true counts as false."
    return parameter("query", name, schema, description)


def json_arguments(arguments: Collection[Schema], required: Collection[str]) -> Schema:
    """The schema of a JSON body with these arguments, of their own types: there a wrong type is an error.

    The arguments are made by `argument`.
    """
    properties = {}
    for row in arguments:
        schema = dict(row["schema"])
        kinds = schema.pop("anyOf", None)
        properties[row["name"]] = {**(kinds[0] if kinds else {}), **schema, "description": row["description"]}
    return {"type": "object", "required": list(required), "properties": properties}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "integer"}
_FLAG: Schema = {"type": "boolean"}
_TEXT_OR_NULL: Schema = {**_TEXT, "nullable": True}
_NUMBER_OR_NULL: Schema = {**_NUMBER, "nullable": True}

_WORKER = _object(
    {
        "id": _TEXT,
        "startTime": _TEXT,
        "status": {"type": "string", "enum": ["READY", "UNLOADING"]},
        "memoryUsage": _NUMBER,
        "pid": _NUMBER,
        "gpu": _FLAG,
        "gpuUsage": _TEXT,
    },
    {"gpuIds": _list(_NUMBER), "progress": _TEXT, "lastExit": _TEXT, "lastLines": _list(_TEXT)},
)
_MODEL = _object(
    {
        **dict.fromkeys(("modelName", "modelVersion", "modelUrl", "runtime"), _TEXT),
        **dict.fromkeys(("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay"), _NUMBER),
        **dict.fromkeys(("responseTimeout", "startupTimeout", "maxRetryTimeoutInSec", "clientTimeoutInMills"), _NUMBER),
        "parallelType": _TEXT,
        "parallelLevel": _NUMBER,
        "deviceType": _TEXT,
        **dict.fromkeys(("continuousBatching", "useJobTicket", "useVenv", "stateful", "loadedAtStartup"), _FLAG),
        **dict.fromkeys(("sequenceMaxIdleMSec", "sequenceTimeoutMSec"), _NUMBER),
        **dict.fromkeys(("maxNumSequence", "maxSequenceJobQueueSize"), _NUMBER),
        "workers": _list({"$ref": "#/components/schemas/Worker"}),
        "jobQueueStatus": _object({"remainingCapacity": _NUMBER, "pendingRequests": _NUMBER}),
    },
    {"deviceIds": _list(_NUMBER), "customizedMetadata": {"type": "object"}},
)
_PLUGIN = _object(
    {
        **dict.fromkeys(("name", "version", "group", "from", "process", "state", "error"), _TEXT),
        "errors": {"type": "integer"},
    }
)


_MS: Schema = {"type": "number", "description": "Milliseconds."}
_SPAN = _object({"name": _TEXT, "start_ms": _MS, "duration_ms": _MS, "attributes": {"type": "object"}})
_TRACE = _object(
    {
        **dict.fromkeys(("request_id", "model", "method", "path"), _TEXT),
        **dict.fromkeys(("trace_id", "version", "error", "batch_close_reason"), _TEXT_OR_NULL),
        "protocol": {"type": "string", "enum": ["http", "grpc", "workflow"]},
        "status": _NUMBER,
        "started": {"type": "number", "description": "Seconds since 1970."},
        "duration_ms": _MS,
        "kept_because": {"type": "string", "enum": ["slow", "failed", "sampled"]},
        **dict.fromkeys(("batch_size", "worker"), _NUMBER_OR_NULL),
        "spans": _list(_SPAN),
    }
)

#: The schemas that operations refer to.
COMPONENTS: dict[str, Schema] = {
    "Bytes": BINARY,
    "Error": _object(
        {
            "code": {"type": "integer", "description": "The status."},
            "type": {"type": "string", "description": "The kind of error."},
            "message": {"type": "string", "description": "What went wrong."},
        }
    ),
    "Model": _MODEL,
    "ModelList": _object({"models": _list(_object({"modelName": _TEXT, "modelUrl": _TEXT}))}, {"nextPageToken": _TEXT}),
    "Models": _list({"$ref": "#/components/schemas/Model"}),
    "OipIndex": _list(_object(dict.fromkeys(("name", "version", "state", "reason"), _TEXT))),
    "OipLive": _object({"live": _FLAG}),
    "OipLoad": _object({"name": _TEXT, "load": _FLAG}),
    "OipUnload": _object({"name": _TEXT, "unload": _FLAG}),
    "OipModel": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list({"type": "object"}),
            "outputs": _list({"type": "object"}),
        }
    ),
    "OipModelReady": _object({"name": _TEXT, "ready": _FLAG}),
    "OipReady": _object({"ready": _FLAG}),
    "OipServer": _object({"name": _TEXT, "version": _TEXT, "extenstion": _list(_TEXT)}),
    "OpenApi": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    "Ready": _object({"name": _TEXT, "ready": _FLAG}),
    "Started": _object({"started": _FLAG}),
    "Status": _object({"status": _TEXT}),
    "Worker": _WORKER,
    "Trace": _TRACE,
    "Traces": _object({"traces": _list({"$ref": "#/components/schemas/Trace"})}),
    "Plugins": _object({"plugins": _list(_PLUGIN)}),
    "WorkflowList": _object(
        {"workflows": _list(_object({"workflowName": _TEXT, "workflowUrl": _TEXT}))}, {"nextPageToken": _TEXT}
    ),
    "Workflows": _list(
        _object(
            {
                **dict.fromkeys(("workflowName", "workflowUrl"), _TEXT),
                **dict.fromkeys(("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay"), _NUMBER),
                "workflowDag": _TEXT,
                "longestMs": _NUMBER,
            }
        )
    ),
}

HEADERS: dict[str, Schema] = {
    "RequestId": {
        "description": "The id of the request, in the server's logs and for the handler too.",
        "required": True,
        "schema": {"type": "string", "format": "uuid"},
    }
}
HEADER_LINKS: dict[str, Schema] = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}


def _key(description: str) -> Schema:
    return {"type": "http", "scheme": "bearer", "description": description}


#: The keys of key_file.json.
KEYS: dict[str, Schema] = {
    "inference": _key("Asks models."),
    "management": _key("Manages models."),
    "API": _key("Renews the other keys."),
}
