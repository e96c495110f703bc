"""What handlers report: lines on a model worker's stdout, checked against metrics.yaml and summed.

The worker template, which reads the workers' output, has a `ModelMetrics`. Where metrics go to the logs it gives the
lines for model_metrics.log. Where they go to Prometheus it sums values up, and hands over what came since the last
time a few times a second: what counters went up by, the last value of gauges, what was added to histograms. These
updates go through the batcher to the supervisor, whose `ReportedMetrics` has the sums of all workers there ever were.
So a metric outlives the death of every process but the supervisor.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from wsgi_ts.metrics.exposition import Family, Histogram, model_line
from wsgi_ts.metrics.specification import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    HOSTNAME,
    OWN_PREFIX,
    MetricsConfigError,
    MetricSpec,
    MetricsSpecification,
    load_specification,
)
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

PROMETHEUS_MODE = "prometheus"
#: What the times of a handler's methods are called, which are reported only where the model's YAML asks for them.
PHASE_PREFIX = "ts_handler_"
#: Upper bounds of the buckets of histograms, those of Prometheus' clients.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
#: Sets of label values that are kept of one metric. A handler that puts a request's id into a dimension has a new one
#: for each request, and would fill all memory.
MAX_SERIES = 1000
#: Metrics that are kept, against a handler that makes up names.
MAX_METRICS = 1000
_TOO_MANY_NAMES = f"Handlers report more than {MAX_METRICS} metrics; further ones are dropped"
#: Names of metrics whose troubles are told, each once.
_MAX_TOLD = 100
_LINE = re.compile(
    r"(?P<name>[\w\s]+)\.(?P<unit>[\w\s]+):(?P<value>[0-9\-+,.e]+)\|#(?P<dimensions>[^|]*)"
    r"(?:\|#type:(?P<kind>[^|,]*))?\|#hostname:(?P<host>[^,]+),(?:timestamp:)?(?P<epoch>[^,]+)(?:,(?P<requests>.*))?"
)


@dataclass(frozen=True, slots=True)
class ReportedValue:
    """One line of a handler or of `system_metrics_cmd`.

    Attributes:
        unit: as reported.
        dimensions: names and values, in the order of the line.
        kind: `counter`, `gauge` or `histogram`; a counter where the line does not say.
        host: who reported it.
        epoch: when, in seconds since the epoch.
        request_ids: the requests it belongs to, joined by commas; "" for none.
    """

    name: str
    unit: str
    value: float
    dimensions: dict[str, str]
    kind: str
    host: str
    epoch: str
    request_ids: str


def parse_line(text: str) -> ReportedValue | None:
    """Reads `Name.Unit:1.0|#Level:Model|#type:GAUGE|#hostname:h,1700000000,request-id`; None for anything else."""
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    try:
        value = float(match["value"])
    except ValueError:
        return None
    pairs = (piece.partition(":") for piece in match["dimensions"].split(","))
    kind = (match["kind"] or COUNTER).lower()
    return ReportedValue(
        match["name"],
        match["unit"],
        value,
        {name: text for name, colon, text in pairs if colon},
        kind if kind in (COUNTER, GAUGE, HISTOGRAM) else COUNTER,
        match["host"],
        match["epoch"],
        match["requests"] or "",
    )


@dataclass(slots=True)
class _Sums:
    """One metric and what is known of it for each set of label values.

    A value of `series` is `[number]`, or for a histogram `[sum, count of the first bucket, …]`.
    """

    spec: MetricSpec
    series: dict[tuple[str, ...], list[float]] = field(default_factory=dict)

    def place(self, values: tuple[str, ...]) -> list[float] | None:
        """Where the value of a set of labels stands; None where there are too many sets."""
        found = self.series.get(values)
        if found is None:
            if len(self.series) >= MAX_SERIES:
                return None
            size = len(BUCKETS) + 2 if self.spec.kind == HISTOGRAM else 1
            found = self.series[values] = [0.0] * size
        return found


class ModelMetrics:
    """The metrics that one worker template reads; without a usable specification nothing is recorded."""

    def __init__(self, specification: MetricsSpecification | None, mode: str, auto_detect: bool) -> None:
        self._specification = specification
        self._known = dict(specification.model) if specification is not None else {}
        self._summed = mode == PROMETHEUS_MODE
        self._auto_detect = auto_detect and specification is not None
        self._sums: dict[str, _Sums] = {}
        self._told: set[str] = set()

    @classmethod
    def load(cls, config_file: Path | None, mode: str, auto_detect: bool) -> ModelMetrics:
        """Reads metrics.yaml; what is wrong with it is the supervisor's to tell."""
        try:
            specification = load_specification(config_file, for_prometheus=mode == PROMETHEUS_MODE)
        except MetricsConfigError:
            return cls(None, mode, auto_detect)
        return cls(specification, mode, auto_detect)

    def record(self, reported: ReportedValue) -> str | None:
        """Takes a value; returns the message for model_metrics.log, None where it does not go there."""
        spec = self._known.get(reported.name) or self._detect(reported)
        if spec is None:
            return None
        try:
            values = (*(reported.dimensions[name] for name in spec.dimensions[:-1]), reported.host)
        except KeyError as missing:
            fault = f"it was reported without the dimension {missing} of metrics.yaml"
            self._tell(f"{spec.name} lacks", logging.ERROR, f"Failed to update metric {spec.name}: {fault}")
            return None
        if not self._summed:
            return model_line(spec, values, reported.value, reported.epoch, reported.request_ids)
        self._add(spec, values, reported.value)
        return None

    @property
    def has_updates(self) -> bool:
        """Whether there is something to hand over."""
        return bool(self._sums)

    def take_updates(self) -> list[list[Any]]:
        """What came since the last call, for `ReportedMetrics.apply`: JSON-ready."""
        sums, self._sums = self._sums, {}
        return [
            [each.spec.name, each.spec.kind, each.spec.unit, each.spec.dimensions, list(each.series.items())]
            for each in sums.values()
        ]

    def _add(self, spec: MetricSpec, values: tuple[str, ...], value: float) -> None:
        sums = self._sums.get(spec.name)
        if sums is None:
            sums = self._sums[spec.name] = _Sums(spec)
        place = sums.place(values)
        if place is None:
            self._tell(f"{spec.name} series", logging.ERROR, _too_many(spec.name))
        elif spec.kind == GAUGE:
            place[0] = value
        elif spec.kind == COUNTER:
            place[0] += max(0.0, value)
        else:
            place[0] += value
            place[1 + bisect_left(BUCKETS, value)] += 1

    def _detect(self, reported: ReportedValue) -> MetricSpec | None:
        """The spec of a metric that metrics.yaml does not list, where such metrics are wanted."""
        name = reported.name
        if self._specification is None:
            return None
        if not self._auto_detect and not name.startswith(PHASE_PREFIX):
            text = f"The metric {name} of a handler is dropped: metrics.yaml does not list it under model_metrics"
            self._tell(f"{name} unknown", logging.WARNING, f"{text}, and model_metrics_auto_detect is not true")
            return None
        dimensions = tuple(each for each in reported.dimensions if each != HOSTNAME)
        spec = MetricSpec(name, reported.kind, reported.unit, (*dimensions, HOSTNAME))
        if name in self._specification.server or name.startswith(OWN_PREFIX):
            self._tell(f"{name} taken", logging.ERROR, f"The metric {name} of a handler is dropped: the name is taken")
            return None
        if len(self._known) >= MAX_METRICS:
            self._tell(_TOO_MANY_NAMES, logging.ERROR, _TOO_MANY_NAMES)
            return None
        if self._summed and not spec.is_exposable:
            text = f"The metric {name} of a handler is dropped: Prometheus does not allow its name or dimensions"
            self._tell(f"{name} form", logging.ERROR, text)
            return None
        log.info("Registering auto detected backend metric: %s", spec)
        self._known[name] = spec
        return spec

    def _tell(self, what: str, level: int, text: str) -> None:
        """Logs something, once."""
        if what not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(what)
            log.log(level, "%s", text)


class ReportedMetrics:
    """The sums of what all handlers have reported; metrics of metrics.yaml are shown before they have a value."""

    def __init__(self, specification: MetricsSpecification | None) -> None:
        known = specification.model if specification is not None else {}
        self._sums = {name: _Sums(spec) for name, spec in known.items()}
        self._refused: set[str] = set()

    def apply(self, updates: Iterable[list[Any]]) -> None:
        """Adds what a worker template has handed over (`ModelMetrics.take_updates`)."""
        for name, kind, unit, dimensions, series in updates:
            spec = MetricSpec(name, kind, unit, tuple(dimensions))
            if name not in self._sums and len(self._sums) >= MAX_METRICS:
                self._refuse(_TOO_MANY_NAMES, _TOO_MANY_NAMES)
                continue
            sums = self._sums.setdefault(name, _Sums(spec))
            if (sums.spec.kind, sums.spec.dimensions) != (spec.kind, spec.dimensions):
                self._refuse(name, f"The metric {name} of a handler is dropped: another one reports it as {sums.spec}")
                continue
            for values, numbers in series:
                place = sums.place(tuple(values))
                if place is None:
                    self._refuse(name, _too_many(name))
                elif kind == GAUGE:
                    place[:] = numbers
                else:
                    place[:] = [old + more for old, more in zip(place, numbers, strict=True)]

    def _refuse(self, name: str, reason: str) -> None:
        """Says why values of a metric are dropped, once."""
        if name not in self._refused:
            self._refused.add(name)
            log.error("%s", reason)

    def families(self) -> list[Family]:
        """The metrics with their values."""
        found = []
        for sums in list(self._sums.values()):
            family = Family.of(sums.spec)
            for values, numbers in list(sums.series.items()):
                if sums.spec.kind == HISTOGRAM:
                    family.samples[values] = Histogram(BUCKETS, [int(count) for count in numbers[1:]], numbers[0])
                else:
                    family.samples[values] = numbers[0]
            found.append(family)
        return found


def _too_many(name: str) -> str:
    return (
        f"The metric {name} of a handler has more than {MAX_SERIES} different sets of dimension values; further ones "
        "are dropped. Use dimensions with few values, never a request's id"
    )
