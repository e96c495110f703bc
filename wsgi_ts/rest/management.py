"""The management API: reads a request's arguments, asks the supervisor, and passes its answer on.

The supervisor decides everything about models; here is only what HTTP adds: arguments, defaults, methods, and the
refusal of calls that `enable_model_api` does not allow. Of a repeated query argument the first value counts. As with
TorchServe a number that does not parse counts as absent, and a boolean is true when it says so in any case, else false;
the log warns of what a register call does not mean. In a JSON body a value of another kind is an error.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import falcon

from wsgi_ts.control.client import QUICK_CALL_S, ControlPlane
from wsgi_ts.errors import BadRequest, MethodNotAllowed, PayloadTooLarge
from wsgi_ts.models.arguments import RegisterArguments, ScaleArguments, page_arguments, read_argument
from wsgi_ts.plugins.report import plugin_rows
from wsgi_ts.rest import openapi
from wsgi_ts.rest.responses import JSON_TYPE, REQUEST_ID_KEY, head_of, write_json
from wsgi_ts.settings.lenient_json import parse_lenient
from wsgi_ts.settings.table import settings_of

if TYPE_CHECKING:
    from wsgi_ts.dataplane.descriptions import HandlerDescriptions
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)

#: Arguments of a scale call that TorchServe's documents name, without an effect there either.
_WITHOUT_EFFECT = ("number_gpu", "timeout")
#: Lines in the log for one call.
_MOST_WARNINGS = 8

#: Longest JSON body of a register call, in bytes; it holds a dozen short arguments.
MAX_JSON_BYTES = 65536
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}")
_INT32 = range(-(2**31), 2**31)


class _Resource:
    """Something that the supervisor is asked about; with `enable_model_api` off no model comes or goes."""

    def __init__(self, instance: Instance, control: ControlPlane) -> None:
        self._instance = instance
        self._control = control

    def _refuse_unless_enabled(self) -> None:
        if not self._instance.config.enable_model_api:
            raise MethodNotAllowed()


class ModelsResource(_Resource):
    """`/models`: list and register."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists the models by name, `limit` of them from number `next_page_token` on."""
        page = page_arguments(integer_argument(req, "limit"), integer_argument(req, "next_page_token"))
        write_answer(resp, self._control.call("list_models", timeout_s=QUICK_CALL_S, **page))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Registers a model version, by query string or by JSON body."""
        self._refuse_unless_enabled()
        arguments = json_arguments(req) if is_json(req) else query_arguments(req)
        if arguments["url"] is None:
            raise BadRequest("Parameter url is required.")
        if arguments["synchronous"] is None:
            arguments["synchronous"] = True
        write_answer(resp, self._control.call("register_model", **arguments))


class ModelResource(_Resource):
    """`/models/{model}[/{version}]`: describe, scale, unregister; `…/set-default`, and `/v1/models/{model}`."""

    def __init__(self, instance: Instance, control: ControlPlane) -> None:
        super().__init__(instance, control)
        self._descriptions: HandlerDescriptions | None = None
        self._lock = threading.Lock()

    def on_get(self, req: falcon.Request, resp: falcon.Response, model: str, version: str | None = None) -> None:
        """Describes one version, the default one, or `all`; with `customized` in the handler's own words, too."""
        answer = self._describe(model, version)
        if boolean_argument(req, "customized") and version != "all":
            (description,) = answer["body"]
            name, shown, limit_s = (description[key] for key in ("modelName", "modelVersion", "responseTimeout"))
            said = self._ask_handlers().ask(name, shown, limit_s, head_of(req), req.env.get(REQUEST_ID_KEY))
            if said is not None:
                description["customizedMetadata"] = said
        write_answer(resp, answer)

    def on_put(self, req: falcon.Request, resp: falcon.Response, model: str, version: str | None = None) -> None:
        """Sets the number of workers."""
        warn_of_unknown(req, req.params, (*settings_of(ScaleArguments), *_WITHOUT_EFFECT))
        least = integer_argument(req, "min_worker")
        least = 1 if least is None else least
        most = integer_argument(req, "max_worker")
        answer = self._control.call(
            "scale_model",
            model_name=model,
            version=version if version is not None else argument(req, "model_version"),
            min_worker=least,
            max_worker=least if most is None else most,
            synchronous=boolean_argument(req, "synchronous"),
        )
        write_answer(resp, answer)

    def on_delete(self, req: falcon.Request, resp: falcon.Response, model: str, version: str | None = None) -> None:
        """Unregisters one version."""
        self._refuse_unless_enabled()
        write_answer(resp, self._control.call("unregister_model", model_name=model, version=version))

    def on_options(self, req: falcon.Request, resp: falcon.Response, model: str, version: str | None = None) -> None:
        """The OpenAPI document of one model; 404 when there is none of that name."""
        self._describe(model, version)
        write_json(resp, 200, openapi.model_management_document(model))

    def _ask_handlers(self) -> HandlerDescriptions:
        """The way to the handlers: most processes that manage models never need it, and it loads the data plane."""
        with self._lock:
            if self._descriptions is None:
                from wsgi_ts.dataplane.descriptions import HandlerDescriptions

                self._descriptions = HandlerDescriptions(self._instance)
            return self._descriptions

    def _describe(self, model: str, version: str | None) -> dict[str, Any]:
        answer: dict[str, Any] = self._control.call(
            "describe_model", timeout_s=QUICK_CALL_S, model_name=model, version=version
        )
        return answer

    def on_put_default(self, req: falcon.Request, resp: falcon.Response, model: str, version: str) -> None:
        """Makes this version the one that requests without a version go to."""
        answer = self._control.call("set_default", timeout_s=QUICK_CALL_S, model_name=model, version=version)
        write_answer(resp, answer)

    def on_get_ready(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        """Says whether the model has workers, as KServe asks it."""
        write_answer(resp, self._control.call("kserve_ready", timeout_s=QUICK_CALL_S, model_name=model))


class Plugins(_Resource):
    """`/plugins`."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lists the plugins, one entry for each process that has loaded one."""
        rows = plugin_rows(self._instance.config.found_plugins, self._instance.run_dir)
        write_json(resp, 200, {"plugins": rows})


def add_routes(app: falcon.App[Any, Any], instance: Instance, control: ControlPlane) -> None:
    """Gives `app`, that of a management (or combined) listener, the management routes."""
    one_model = ModelResource(instance, control)
    app.add_route("/models", ModelsResource(instance, control))
    app.add_route("/models/{model}", one_model)
    app.add_route("/models/{model}/{version}", one_model)
    app.add_route("/models/{model}/{version}/set-default", one_model, suffix="default")
    app.add_route("/v1/models/{model}", one_model, suffix="ready")
    app.add_route("/plugins", Plugins(instance, control))


def may_wait(environ: Mapping[str, Any]) -> bool:
    """Whether a call, as WSGI has it, may last as long as a model takes to load, to end or to answer."""
    path = environ["PATH_INFO"].rstrip("/")
    if environ["REQUEST_METHOD"] in ("POST", "PUT", "DELETE"):
        waits = ("/models", "/workflows", "/v2/repository/", "/console/inference/")
        return path.startswith(waits) and not path.endswith("/set-default")
    return "customized" in environ["QUERY_STRING"]


def write_answer(resp: falcon.Response, answer: dict[str, Any]) -> None:
    """Makes `resp` what the supervisor answered: `{"status": HTTP status, "body": JSON}`."""
    write_json(resp, answer["status"], answer["body"])


def argument(req: falcon.Request, name: str) -> str | None:
    """A query argument's first value, None when it is absent."""
    value: str | list[str] | None = req.params.get(name)
    return value[0] if isinstance(value, list) else value


def integer_argument(req: falcon.Request, name: str) -> int | None:
    """A query argument as a 32-bit number, None when it is absent or is none."""
    return to_integer(argument(req, name))


def boolean_argument(req: falcon.Request, name: str) -> bool:
    """A query argument as a boolean: true when it says so in any case, else false, also when it is absent."""
    return (argument(req, name) or "").lower() == "true"


def warn_of_unknown(req: falcon.Request, given: Iterable[str], known: Collection[str]) -> None:
    """Names the arguments in the log that have no effect, as in TorchServe: of a typo nobody else would tell."""
    for name in [each for each in given if each not in known][:_MOST_WARNINGS]:
        from wsgi_ts.settings.sources import nearest  # only a mistake pays for it

        log.warning("%s %s has no argument %r%s", req.method, req.uri_template, name[:64], nearest(name, known))


def to_integer(text: str | None) -> int | None:
    """A decimal 32-bit number with an optional sign; None for everything else."""
    if text is None or not _INTEGER.fullmatch(text):
        return None
    value = int(text)
    return value if value in _INT32 else None


def is_json(req: falcon.Request) -> bool:
    """Whether the request says that its body is JSON, whatever the charset."""
    return (req.content_type or "").partition(";")[0].strip().lower() == JSON_TYPE


def query_arguments(req: falcon.Request) -> dict[str, Any]:
    """The register call's arguments from the query string; those not given, empty or of another kind are None."""
    given = {}
    known = settings_of(RegisterArguments)
    warn_of_unknown(req, req.params, known)
    for name, row in known.items():
        text = argument(req, name)
        if row.kind.json_type != "string":
            text = (text or "").strip() or None
        try:
            given[name] = read_argument(name, row, text)
        except BadRequest as error:
            log.warning("%s The default counts.", error.message)
            given[name] = None if row.kind.json_type != "boolean" else False
    return given


def json_arguments(req: falcon.Request) -> dict[str, Any]:
    """The register call's arguments from the JSON body; those not given are None.

    The query string is not looked at.

    Raises:
        BadRequest: the body is no JSON object, or an argument has a value of another kind.
        PayloadTooLarge: the body is longer than `MAX_JSON_BYTES`.
    """
    fields, known = parse_body(read_body(req)), settings_of(RegisterArguments)
    warn_of_unknown(req, fields, known)
    return {name: read_argument(name, row, fields.get(name)) for name, row in known.items()}


def read_body(req: falcon.Request) -> bytes:
    """The whole body, chunked or not.

    Raises:
        PayloadTooLarge: it is longer than `MAX_JSON_BYTES`.
    """
    # Falcon bounds a stream by Content-Length, which a chunked body lacks; some servers end it themselves.
    stream = req.stream if req.env.get("wsgi.input_terminated") else req.bounded_stream
    body: bytes = stream.read(MAX_JSON_BYTES + 1)
    if len(body) > MAX_JSON_BYTES:
        raise PayloadTooLarge(f"A register call's body may have {MAX_JSON_BYTES} bytes.")
    return body


def parse_body(body: bytes) -> dict[str, Any]:
    """Reads a JSON object as TorchServe does: single quotes and unquoted words are accepted too.

    An empty body is an empty object.

    Raises:
        BadRequest: it is not an object.
    """
    try:
        text = body.decode("utf-8-sig").strip()
        fields = parse_lenient(text) if text else {}
    except ValueError as error:
        raise BadRequest("The body is not a JSON object.") from error
    if not isinstance(fields, dict):
        raise BadRequest("The body is not a JSON object.")
    return fields
