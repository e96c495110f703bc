"""What plugins of the group `events` are told: on a thread of its own, from a queue with an end.

Whoever tells never waits. What does not fit into the queue is dropped and counted. A plugin that raises is told of the
next event all the same; one that hangs is told of nothing until it has come back. Only `model_registering` is asked and
answered, since it may say no.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from wsgi_ts.errors import ServerError
from wsgi_ts.plugins.api import Veto
from wsgi_ts.plugins.found import Found, found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import LimitedCalls, within
from wsgi_ts.settings.config import Config

MOST_QUEUED = 1000
VETO_LIMIT_S = 5.0
CALL_LIMIT_S = 10.0
_LOAD_LIMIT_S = 30.0


class Events:
    """The listeners of one process, and what they are still to be told.

    Args:
        report: is told of each listener; None for a process without plugins.
        only: the events that happen in this process; empty: all.
    """

    def __init__(self, config: Config, report: PluginReport | None, *only: str) -> None:
        self._config = config
        self._report = report
        self._only = only
        self._queue: deque[tuple[str, dict[str, Any]]] = deque()
        self._changed = threading.Condition()
        self._loaded = threading.Event()
        self._listeners: list[tuple[Found, Any, LimitedCalls]] = []
        self.is_on = report is not None and bool(found_in(config.found_plugins, "events"))
        if self.is_on:
            threading.Thread(target=self._work, name="plugin events", daemon=True).start()

    def tell(self, event: str, **what: Any) -> None:
        """Has the listeners told of an event, soon; returns at once."""
        if not self.is_on:
            return
        with self._changed:
            is_full = len(self._queue) >= MOST_QUEUED
            if not is_full:
                self._queue.append((event, what))
                self._changed.notify()
        if is_full and self._report is not None:
            for found, _, _ in self._listeners:
                self._report.dropped(found)

    def ask_model_registering(self, **what: Any) -> None:
        """Asks the listeners whether a model may be registered; one that fails or does not answer has no say.

        Raises:
            ServerError: it may not.
        """
        if not self.is_on or self._report is None or not self._loaded.wait(_LOAD_LIMIT_S):
            return
        for found, listener, _ in self._listeners:
            method = getattr(listener, "model_registering", None)
            if method is None:
                continue
            try:
                within(VETO_LIMIT_S, lambda method=method: _call(method, what))  # type: ignore[misc]
            except Veto as veto:
                text = f"Model {what['name']} may not be registered: {veto}"
                raise ServerError(text, status=403, type_name="ModelVetoedException") from veto
            except Exception as error:
                self._report.failed(found, error, instead="the model is registered")

    def listeners_to(self, event: str) -> list[Any]:
        """Those that listen to an event; waits until they are loaded."""
        if not self.is_on or not self._loaded.wait(_LOAD_LIMIT_S):
            return []
        return [listener for _, listener, _ in self._listeners if hasattr(listener, event)]

    def settle(self, limit_s: float) -> None:
        """Waits until all are told, at most so long: the process is about to end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or not self.is_on, limit_s)

    def _work(self) -> None:
        report = self._report
        if report is None:
            return
        for found, listener in report.instances(self._config, "events"):
            if not self._only or any(hasattr(listener, event) for event in self._only):
                self._listeners.append((found, listener, LimitedCalls(f"plugin {found.name}")))
        self._loaded.set()
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                event, what = self._queue[0]
            for found, listener, calls in self._listeners:
                method = getattr(listener, event, None)
                if method is not None:
                    _tell_one(report, found, calls, partial(_call, method, what))
            with self._changed:
                self._queue.popleft()
                self._changed.notify_all()


def _tell_one(report: PluginReport, found: Found, calls: LimitedCalls, call: Callable[[], None]) -> None:
    """Has a listener told, which may take its time, but not for ever."""
    if calls.is_stuck:
        report.dropped(found)
        return
    try:
        calls.make(CALL_LIMIT_S, call)
    except TimeoutError as error:
        instead = "it is told of nothing more until it comes back" if calls.is_stuck else ""
        report.failed(found, error, instead=instead)
    except Exception as error:
        report.failed(found, error)


def _call(method: Callable[..., Any], what: dict[str, Any]) -> None:
    """Calls a listener with those arguments that it names, so that later versions may have more of them."""
    parameters = inspect.signature(method).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        method(**what)
    else:
        method(**{each.name: what[each.name] for each in parameters if each.name in what})
