"""Adds plugins to a web worker when it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.plugins.auth import load_gate
from wsgi_ts.plugins.events import Events
from wsgi_ts.plugins.found import found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.web.connection import Connection
from wsgi_ts.web.listeners import Endpoint
from wsgi_ts.web.middleware import wrapped
from wsgi_ts.web.middleware_limits import LoopLimit
from wsgi_ts.web.plugins import load_endpoints
from wsgi_ts.web.report import Report
from wsgi_ts.web.sampled_report import EVENT, SampledReport, sampled

if TYPE_CHECKING:
    from wsgi_ts.instance.instance import Instance


def add_plugins(
    instance: Instance, kind: str, endpoints: Sequence[Endpoint], exchange: Exchange[Connection] | None
) -> Callable[[LineLog, Board, int, int], Report]:
    """Loads the plugins of a web worker, and puts them where they are called.

    Returns:
        What makes the report of answers.
    """
    report = PluginReport(instance.run_dir, f"web worker {kind}")
    kinds = {each for endpoint in endpoints for each in endpoint.kinds}
    config = instance.config
    if found_in(config.found_plugins, "middleware"):
        limit = LoopLimit() if config.middleware_all else None
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
