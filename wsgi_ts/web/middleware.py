"""WSGI middleware of users around the apps of a web worker; without it they are what they were.

A layer that raises, hangs or takes too long is left out of the request. What it keeps from being answered is at most
one request for as long as `middleware_limits` says, and predictions pass without it once it has been late too often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from wsgi_ts.plugins.found import Found, bare
from wsgi_ts.plugins.report import LOADED, OFF, PluginReport
from wsgi_ts.plugins.threads import Late
from wsgi_ts.rest.inference import ANSWER_KEY
from wsgi_ts.rest.plugin_endpoints import WSGIApp
from wsgi_ts.settings.config import Config
from wsgi_ts.web.app import no_write
from wsgi_ts.web.middleware_limits import LOOP_TIMEOUT_S, TIMEOUT_S, LayerThreads, MainThreadLimit, OwnTime

_SAID = "wsgi_ts.middleware.said"
_WITHOUT = "the request passes without it"
#: A layer that has been late for so many predictions, one after the other, is left out of those of the next seconds.
MOST_LATE = 3
OFF_S = 60.0


def wrapped(app: WSGIApp, config: Config, report: PluginReport, limit: MainThreadLimit | None = None) -> WSGIApp:
    """The app in its middleware, the outermost first in the configuration.

    The report is told of each, and of what it raises. `limit` is of what runs on the loop's thread; None where no
    predictions pass middleware.
    """
    inner = app
    for found, factory in reversed(list(report.load(config, "middleware"))):
        make = partial(_Layer, found, bare(factory), inner, report, limit)
        layer = report.begun(found, make, "requests pass without it")
        if layer is not None:
            inner = layer
    if inner is app or config.middleware_all:
        return inner
    return _but_predictions(inner, app)


class _Said:
    """What the app inside a layer has answered to the request under way.

    Args:
        enter, leave: called before and after that app.
    """

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self.enter = enter
        self.leave = leave
        self.arguments: tuple[Any, ...] = ()
        self.parts: list[bytes] = []


class _Layer:
    """A layer that may raise or be late: the app inside it answers then, and is called only once.

    Args:
        factory: makes the layer; what it raises is raised.
    """

    def __init__(
        self, found: Found, factory: Any, inner: WSGIApp, report: PluginReport, limit: MainThreadLimit | None
    ) -> None:
        self._found = found
        self._outer: WSGIApp = factory(_remembered(inner))
        self._inner = inner
        self._report = report
        self._timeout_s = timeout_s = float(getattr(factory, "timeout_s", TIMEOUT_S))
        self._loop_timeout_s = min(timeout_s, LOOP_TIMEOUT_S)
        self._limit = limit
        self._threads = LayerThreads(found.name)
        self._late = 0  # predictions for which it was late, one after the other
        self._off_until = 0.0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answers a request."""
        if ANSWER_KEY in environ and self._limit is not None:
            return self._on_loop(self._limit, environ, start_response)
        return self._on_thread(environ, start_response)

    def _on_loop(
        self, limit: MainThreadLimit, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if self._off_until and time.monotonic() < self._off_until:
            return self._inner(environ, start_response)
        said = _Said(limit.end, lambda: limit.begin(self._loop_timeout_s))
        try:
            parts = self._within(limit, environ, said, start_response)
        except Late:
            limit.end()  # where it came between the end of the call and that of its time
            self._note_late()
        except BaseException as error:  # sys.exit in it ends nothing but its own call
            self._report.failed(self._found, error, instead=_WITHOUT)
        else:
            if self._late:
                self._late, self._off_until = 0, 0.0
                self._report.note(self._found, LOADED)
            return parts
        return self._without(environ, said, start_response)

    def _within(
        self, limit: MainThreadLimit, environ: dict[str, Any], said: _Said, start_response: Callable[..., Any]
    ) -> list[bytes]:
        limit.begin(self._loop_timeout_s)
        try:
            return _joined(self._outer({**environ, _SAID: said}, start_response))
        finally:
            limit.end()

    def _note_late(self) -> None:
        """It was late for a prediction: counts that, and leaves it out of more where it is too often."""
        self._late += 1
        told = f"no end within {self._loop_timeout_s:g} s"
        if self._late < MOST_LATE:
            self._report.failed(self._found, told, instead=_WITHOUT)
            return
        self._off_until = time.monotonic() + OFF_S
        instead = f"predictions pass without it for {OFF_S:g} s"
        self._report.failed(self._found, f"{told}, {MOST_LATE} times", state=OFF, instead=instead)

    def _on_thread(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._threads.is_stuck:
            return self._inner(environ, start_response)
        own_time = OwnTime(self._timeout_s)
        said = _Said(own_time.enter, own_time.leave)
        started: list[tuple[Any, ...]] = []
        result: list[list[bytes] | BaseException] = []

        def start(*arguments: Any) -> Any:
            started.append(arguments)
            return no_write

        def call() -> None:
            try:
                result.append(_joined(self._outer({**environ, _SAID: said}, start)))
            except BaseException as error:
                result.append(error)

        if not self._threads.run(call, own_time):
            self._report.failed(self._found, f"no end within {self._timeout_s:g} s", instead=_WITHOUT)
        elif isinstance(result[0], BaseException):
            self._report.failed(self._found, result[0], instead=_WITHOUT)
        elif not started:
            self._report.failed(self._found, "it has not called start_response", instead=_WITHOUT)
        else:
            start_response(*started[-1])
            return result[0]
        return self._without(environ, said, start_response)

    def _without(self, environ: dict[str, Any], said: _Said, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """What the app inside it answers, or has answered."""
        if not said.arguments:
            return self._inner(environ, start_response)
        start_response(*said.arguments)
        return said.parts


def _remembered(inner: WSGIApp) -> WSGIApp:
    """The app that a layer is given; its answer is kept in case the layer fails afterwards."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        said: _Said | None = environ.get(_SAID)
        if said is None:  # a layer that has made an environ of its own
            return inner(environ, start_response)
        arguments: tuple[Any, ...] = ()

        def start(*given: Any) -> Any:
            nonlocal arguments
            arguments = given
            return no_write

        said.enter()
        try:
            parts = _joined(inner(environ, start))
            said.parts, said.arguments = parts, arguments
        finally:
            said.leave()
        start_response(*arguments)
        return parts

    return call


def _joined(parts: Iterable[bytes]) -> list[bytes]:
    return parts if isinstance(parts, list) else [b"".join(_closing(parts))]


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
