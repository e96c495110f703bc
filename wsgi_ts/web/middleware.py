"""WSGI middleware of users around the apps of a web worker; without it they are what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from wsgi_ts.plugins.found import Found, bare
from wsgi_ts.plugins.report import FAILED, PluginReport
from wsgi_ts.rest.inference import ANSWER_KEY
from wsgi_ts.rest.plugin_endpoints import WSGIApp
from wsgi_ts.settings.config import Config

_SAID = "wsgi_ts.middleware.said"


def wrapped(app: WSGIApp, config: Config, report: PluginReport) -> WSGIApp:
    """The app in its middleware, the outermost first in the configuration.

    Args:
        app: the server's own.
        config: the configuration.
        report: is told of each, and of what it raises.
    """
    inner = app
    for found, factory in reversed(list(report.load(config, "middleware"))):
        try:
            outer = bare(factory)(_remembered(inner))
        except Exception as error:
            report.failed(found, error, state=FAILED, instead="requests pass without it")
            continue
        inner = _guarded(found, outer, inner, report)
    if inner is app or config.middleware_all:
        return inner
    return _but_predictions(inner, app)


def _guarded(found: Found, outer: WSGIApp, inner: WSGIApp, report: PluginReport) -> WSGIApp:
    """Middleware that may raise: the app inside it answers then, and is called only once."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        own = {**environ, _SAID: (said := _Said())}
        try:
            parts = outer(own, start_response)
            return parts if isinstance(parts, list) else [b"".join(_closing(parts))]
        except Exception as error:
            report.failed(found, error, instead="the request passes without it")
        if not said.arguments:
            return inner(environ, start_response)
        start_response(*said.arguments)
        return said.parts

    return call


def _remembered(inner: WSGIApp) -> WSGIApp:
    """The app that middleware is given; its answer is kept in case the middleware raises afterwards."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        said: _Said = environ.get(_SAID) or _Said()

        def start(*arguments: Any) -> Any:
            said.arguments = arguments
            return start_response(*arguments)

        parts = inner(environ, start)
        said.parts = parts if isinstance(parts, list) else [b"".join(_closing(parts))]
        return said.parts

    return call


class _Said:
    """What an app has answered to the request under way."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.parts: list[bytes] = []


def _closing(parts: Iterable[bytes]) -> Iterable[bytes]:
    try:
        yield from parts
    finally:
        close = getattr(parts, "close", None)
        if close is not None:
            close()


def _but_predictions(outer: WSGIApp, app: WSGIApp) -> WSGIApp:
    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return (app if ANSWER_KEY in environ else outer)(environ, start_response)

    return call
