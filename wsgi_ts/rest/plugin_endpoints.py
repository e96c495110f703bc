"""Endpoints of plugins as WSGI apps: a function, a class with `do_get`, a Falcon resource, or an app of any kind.

Whatever a plugin raises is answered as TorchServe does it for its own plugins, counted and logged; nobody else notices.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import falcon

from wsgi_ts.errors import MethodNotAllowed, ServerError
from wsgi_ts.plugins.api import Context, EndpointError
from wsgi_ts.plugins.found import Found, made
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.rest.responses import (
    REQUEST_ID_KEY,
    RequestIdHeader,
    Response,
    install_error_handlers,
    response_type,
    write_error,
    write_json,
)
from wsgi_ts.rest.router import Router

log = logging.getLogger("wsgi_ts.plugins")

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
#: Arguments of a function that is an endpoint: (req, resp, ctx); one of two is a WSGI app.
_ENDPOINT_ARGUMENTS = 3
_METHODS = {"GET": "do_get", "POST": "do_post", "PUT": "do_put", "DELETE": "do_delete"}
_NOT_THERE = "No implementation found .. Default implementation invoked"


def first_segment(path: str) -> str:
    """The part of a path by which endpoints are found."""
    return path.partition("/")[2].partition("/")[0]


def endpoint_app(found: Found, plugin: Any, context: Context, report: PluginReport, headers: dict[str, str]) -> WSGIApp:
    """The WSGI app of one endpoint.

    `report` gets what it raises, `headers` are what every answer of the server carries besides the constant ones.
    """
    instance = made(plugin)
    if _is_wsgi(instance):
        return _mounted(found, instance, report)
    app = falcon.App(response_type=response_type(headers), middleware=[RequestIdHeader()], router=Router())
    if not _is_resource(instance):
        # As with predictions: no content type unless the plugin sets one.
        app.resp_options.default_media_type = None  # type: ignore[assignment]

    def on_failure(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
        if not isinstance(error, EndpointError):  # that is an answer
            report.failed(found, error)
        write_error(resp, answer_to(error))

    install_error_handlers(app)
    app.add_error_handler(Exception, on_failure)
    resource = instance if _is_resource(instance) else _PluginResource(found, instance, context)
    app.add_route(f"/{found.path}", resource)
    if not _is_resource(instance) or _takes_rest(instance):
        app.add_route(f"/{found.path}/{{rest:path}}", resource)
    return _guarded(found, app, report)


class _PluginResource:
    """Calls a function, or the method of a class that belongs to the request's method."""

    def __init__(self, found: Found, plugin: Any, context: Context) -> None:
        self._found = found
        self._plugin = plugin
        self._context = context
        self._has_methods = any(hasattr(plugin, name) for name in _METHODS.values())

    def on_request(self, req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        """Answers with what the plugin has returned, or has put into `resp`."""
        began = time.monotonic()
        result = self._function(req.method)(req, resp, self._context)
        write_result(resp, result)
        log.info('Running "%s" endpoint took %d ms', self._found.path, (time.monotonic() - began) * 1000)

    def _function(self, method: str) -> Callable[..., Any]:
        if not self._has_methods:
            function: Callable[..., Any] = self._plugin
            return function
        name = _METHODS.get("GET" if method == "HEAD" else method)
        if name is None:
            raise MethodNotAllowed()
        if not hasattr(self._plugin, name):
            raise EndpointError(_NOT_THERE)
        found: Callable[..., Any] = getattr(self._plugin, name)
        return found


def write_result(resp: falcon.Response, result: Any) -> None:
    """Makes a function's result the answer: text and bytes as they are, all else as JSON; None changes nothing.

    `result` is the body, or a status and the body.
    """
    if isinstance(result, tuple):
        resp.status, result = result
    if result is None:
        return
    if isinstance(result, bytes | bytearray):
        resp.data = bytes(result)
    elif isinstance(result, str):
        resp.text = result
    else:
        write_json(resp, resp.status_code, result)


def answer_to(error: BaseException) -> ServerError:
    """What a client is told of an exception of an endpoint, in TorchServe's words."""
    if isinstance(error, EndpointError):
        return ServerError(error.message, status=error.status, type_name="ModelServerEndpointException")
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return ServerError("Out of memory", status=507, type_name=kind)
    if isinstance(error, OSError):
        return ServerError("I/O error while running the custom endpoint", type_name=kind)
    return ServerError("Unknown exception", type_name=kind)


def _is_resource(plugin: Any) -> bool:
    return any(name.startswith("on_") for name in dir(plugin)) and not callable(plugin)


def _takes_rest(resource: Any) -> bool:
    """Whether a Falcon resource asks for what stands behind its segment."""
    responders = [getattr(resource, name) for name in dir(resource) if name.startswith("on_")]
    return any("rest" in inspect.signature(each).parameters for each in responders if callable(each))


def _is_wsgi(plugin: Any) -> bool:
    """Whether something is called with an environ and `start_response`."""
    if not callable(plugin) or any(hasattr(plugin, name) for name in _METHODS.values()):
        return False
    try:
        parameters = inspect.signature(plugin).parameters.values()
    except (TypeError, ValueError):
        return True
    wanted = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    return len(wanted) < _ENDPOINT_ARGUMENTS


def _guarded(found: Found, app: WSGIApp, report: PluginReport) -> WSGIApp:
    """A Falcon app, which answers every exception itself, but none that would end its thread."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except BaseException as error:
            status, fields, data = _failure(found, error, report, environ)
        start_response(status, [*fields, ("content-length", str(len(data)))])
        return [data]

    return call


def _failure(
    found: Found, error: BaseException, report: PluginReport, environ: dict[str, Any]
) -> tuple[str, list[tuple[str, str]], bytes]:
    """What a client is told of an exception, which is counted: status line, headers, body."""
    report.failed(found, error)
    resp = Response()
    resp.put_header("x-request-id", environ.get(REQUEST_ID_KEY, ""))
    write_error(resp, answer_to(error))
    return f"{resp.status_code} ", list(resp.headers.items()), resp.data or b""


def _mounted(found: Found, app: WSGIApp, report: PluginReport) -> WSGIApp:
    """An app of any kind, which sees its segment as the place where it is mounted."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["SCRIPT_NAME"] = f"/{found.path}"
        environ["PATH_INFO"] = environ["PATH_INFO"][len(found.path) + 1 :]
        said: list[Any] = []
        try:
            parts = app(environ, lambda status, headers, exc_info=None: said.extend((status, headers)))
            data = b"".join(parts)
            close = getattr(parts, "close", None)
            if close is not None:
                close()
            status, headers = said[-2:]
            fields = [(name, value) for name, value in headers if name.lower() != "content-length"]
            fields.append(("x-request-id", environ.get(REQUEST_ID_KEY, "")))
        except BaseException as error:
            status, fields, data = _failure(found, error, report, environ)
        # All of it is there: the client need not wait for the end of the connection.
        start_response(status, [*fields, ("content-length", str(len(data)))])
        return [data]

    return call
