"""Endpoints of plugins in a web worker: loaded in it, called on threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import DaemonThreads, ThreadCall
from wsgi_ts.rest.apps import cors_headers
from wsgi_ts.rest.plugin_context import PluginContext
from wsgi_ts.rest.plugin_endpoints import WSGIApp, endpoint_app

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

#: Threads of one endpoint.
THREADS = 8


class PluginEndpoint:
    """One endpoint, and who is waiting for it.

    Attributes:
        is_stuck: all its threads are in calls that were given up; the server's own answer counts until one is back.
    """

    def __init__(self, found: Found, app: WSGIApp, report: PluginReport) -> None:
        self.found = found
        self.app = app
        self.is_stuck = False
        self._report = report
        self._pool = DaemonThreads(THREADS, f"plugin {found.name}")
        self._lock = threading.Lock()
        self._running = self._late = 0

    def submit(self, call: Callable[[], None]) -> ThreadCall:
        """Has a thread make a call."""
        return self._pool.submit(call, self._begun, self._ended)

    def is_late(self) -> ServerError:
        """A call was given up: counts it, and returns what its client is told."""
        limit_s, path = self.found.timeout_s, self.found.path
        with self._lock:
            self._late = min(self._late + 1, self._running)
            was_stuck, self.is_stuck = self.is_stuck, self._late >= THREADS
        if self.is_stuck and not was_stuck:
            instead = "the server's own answer, if it has one, counts until a call comes back"
            self._report.failed(self.found, f"all its {THREADS} threads hang", state="hangs", instead=instead)
        else:
            self._report.failed(self.found, f"no answer within {limit_s:g} s")
        return ServiceUnavailable(f'Endpoint "{path}" did not answer within {limit_s:g} s.')

    def _begun(self) -> None:
        with self._lock:
            self._running += 1

    def _ended(self) -> None:
        with self._lock:
            self._running -= 1
            self._late = min(self._late, self._running)
            is_back, self.is_stuck = self.is_stuck, False
        if is_back:
            self._report.note(self.found, "loaded")


def load_endpoints(instance: Instance, kinds: Collection[str], report: PluginReport) -> Iterator[PluginEndpoint]:
    """Loads the endpoints of some APIs."""
    config = instance.config
    context = PluginContext(instance)
    for found, plugin in report.load(config, "endpoints", lambda found: found.type in kinds):
        make = partial(endpoint_app, found, plugin, context, report, cors_headers(config))
        app = report.begun(found, make, "the server's own answer counts")
        if app is not None:
            yield PluginEndpoint(found, app, report)
