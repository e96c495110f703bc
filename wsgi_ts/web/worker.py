"""Our gunicorn worker class: it gives gunicorn's sockets, signals and heartbeat to a `WebLoop`.

Submit early, answer late: the loop pushes a prediction to a batcher as soon as it is received, and calls the WSGI app
when the answer is there, which is in the environ then (`requests`, `answers`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from gunicorn.workers.base import Worker

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.plugins.auth import load_gate
from wsgi_ts.plugins.events import Events
from wsgi_ts.plugins.found import found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.rest.direct import DirectAnswers
from wsgi_ts.web.connection import Connection
from wsgi_ts.web.listeners import Endpoint
from wsgi_ts.web.loop import WebLoop
from wsgi_ts.web.middleware import wrapped
from wsgi_ts.web.middleware_limits import MainThreadLimit
from wsgi_ts.web.plugins import load_endpoints
from wsgi_ts.web.report import Report
from wsgi_ts.web.sampled_report import EVENT, SampledReport, sampled

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance

log = logging.getLogger(__name__)


class WebWorker(Worker):  # type: ignore[misc]
    """gunicorn calls `load_wsgi` and then `run` in the worker process; its signal handlers clear `alive`."""

    def load_wsgi(self) -> None:
        """Gets the apps, and everything else that must be there before this worker counts as booted."""
        super().load_wsgi()
        instance = self.app.instance
        app = self.app
        exchange = Exchange[Connection](instance) if app.kind == "inference" else None
        direct = DirectAnswers(instance.config) if instance.config.direct_answers else None
        endpoints = []
        for sock in self.sockets:
            kinds = app.kinds_for(sock)
            context = app.context if instance.config.addresses[kinds[0]].is_tls else None
            endpoints.append(Endpoint(sock, kinds, app.app_for(sock), context, direct))
        make_report: Callable[[LineLog, Board, int, int], Report] = Report
        if instance.config.found_plugins:
            # In the worker and not before the fork: a plugin may start threads, or open connections.
            make_report = add_plugins(instance, app.kind, endpoints, exchange, self.notify)
        self._loop = WebLoop(instance, endpoints, exchange, self.PIPE[0], self._on_tick, make_report)

    def run(self) -> None:
        """Serves until told to stop."""
        self._loop.run(lambda: self.alive)

    def _on_tick(self) -> bool:
        self.notify()
        if self.ppid == os.getppid():
            return True
        log.info("The gunicorn arbiter has gone; this web worker leaves.")
        return False


def add_plugins(
    instance: Instance,
    kind: str,
    endpoints: Sequence[Endpoint],
    exchange: Exchange[Connection] | None,
    alive: Callable[[], None],
) -> Callable[[LineLog, Board, int, int], Report]:
    """Loads the plugins of a web worker, and puts them where they are called.

    `alive` tells gunicorn that this worker has not died: several plugins that hang take longer than it may.

    Returns:
        What makes the report of answers.
    """
    report = PluginReport(instance.run_dir, f"web worker {kind}", alive)
    kinds = {each for endpoint in endpoints for each in endpoint.kinds}
    config = instance.config
    if found_in(config.found_plugins, "middleware"):
        limit = MainThreadLimit() if config.middleware_all else None
        for endpoint in endpoints:
            endpoint.app = wrapped(endpoint.app, config, report, limit)
            # On threads, but for predictions: middleware may wait for somebody.
            endpoint.may_block = True
            if config.middleware_all:
                endpoint.direct = None
    gate = load_gate(config, report)
    for endpoint in endpoints:
        endpoint.gate = gate
    for plugin in load_endpoints(instance, kinds, report):
        for endpoint in endpoints:
            if plugin.found.type in endpoint.kinds:
                endpoint.plugins[plugin.found.path] = plugin
        if exchange is not None and plugin.found.type == "inference":
            exchange.routes.taken |= {plugin.found.path}
    events = Events(config, report, EVENT)
    share = sampled(events)
    return partial(SampledReport, events, share) if share > 0.0 else Report
