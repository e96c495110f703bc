"""Metric sinks of plugins: each has a thread of its own, and gets all values now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from wsgi_ts.metrics.exposition import Family, Histogram
from wsgi_ts.plugins.api import Sample
from wsgi_ts.plugins.found import Found, found_in
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import LimitedCalls
from wsgi_ts.settings.config import Config

_INTERVAL_S = 10.0
_SHORTEST_S = 0.1
#: How long a sink may take for the values of one moment, in seconds.
_LIMIT_S = 10.0


def start_sinks(
    config: Config, families: Callable[[], list[Family]], report: PluginReport, stopped: threading.Event
) -> None:
    """Starts the threads, which end when `stopped` is set; `report` is told of each sink, and of its failures."""
    if found_in(config.found_plugins, "metrics"):
        threading.Thread(
            target=_load, args=(config, families, report, stopped), name="plugin sinks", daemon=True
        ).start()


def _load(config: Config, families: Callable[[], list[Family]], report: PluginReport, stopped: threading.Event) -> None:
    for found, sink in report.instances(config, "metrics"):
        name = f"plugin {found.name}"
        threading.Thread(target=_feed, args=(found, sink, families, report, stopped), name=name, daemon=True).start()


def _feed(
    found: Found, sink: Any, families: Callable[[], list[Family]], report: PluginReport, stopped: threading.Event
) -> None:
    interval_s = report.begun(found, lambda: float(getattr(sink, "interval_s", _INTERVAL_S)), "it gets nothing")
    if interval_s is None:
        return
    calls = LimitedCalls(f"plugin {found.name} emits")
    while not stopped.wait(max(_SHORTEST_S, interval_s)):
        if calls.is_stuck:
            continue
        samples = samples_of(families())
        try:
            calls.make(_LIMIT_S, partial(sink.emit, samples))
        except Exception as error:
            report.failed(found, error, instead="it gets nothing more until it comes back" if calls.is_stuck else "")


def samples_of(families: Iterable[Family]) -> list[Sample]:
    """The values of metrics, one by one."""
    samples = []
    for family in families:
        for values, value in family.samples.items():
            labels = dict(zip(family.labels, values, strict=True))
            if isinstance(value, Histogram):
                samples.append(Sample(f"{family.name}_count", "counter", labels, float(sum(value.counts))))
                samples.append(Sample(f"{family.name}_sum", "counter", labels, float(value.total)))
            else:
                samples.append(Sample(family.name, family.kind, labels, float(value)))
    return samples
