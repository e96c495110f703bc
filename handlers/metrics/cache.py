"""The metrics of a handler: what `context.metrics` is, and TorchServe's older store of the same purpose.

A value is kept in memory until the service hands all of them over, once per batch; nothing is printed.
"""

from __future__ import annotations

import copy
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

log = logging.getLogger(__name__)

#: Values kept at most between two hand-overs; the oldest go first.
MAX_SAMPLES = 10_000
#: PredictionTime and HandlerTime are recorded for one batch in so many seconds: at thousands of batches a second a
#: line for each would cost more than the inference.
SAMPLE_INTERVAL_S = 0.1

UNITS = {
    "ms": "Milliseconds",
    "s": "Seconds",
    "percent": "Percent",
    "count": "Count",
    "MB": "Megabytes",
    "GB": "Gigabytes",
    "kB": "Kilobytes",
    "B": "Bytes",
    None: "unit",
    "": "unit",
}


class GeneralMetricsCacheError(Exception):
    """The base of the errors below."""

    prefix = "Generic error"

    def __init__(self, message: object = None) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"


class MetricsCacheIOError(GeneralMetricsCacheError):
    """The metrics configuration cannot be read."""

    prefix = "Error reading file"


class MetricsCachePyYamlError(GeneralMetricsCacheError):
    """The metrics configuration is not YAML."""

    prefix = "Error parsing file"


class MetricsCacheTypeError(GeneralMetricsCacheError):
    """An argument has the wrong type."""


class MetricsCacheValueError(GeneralMetricsCacheError):
    """An argument has a value that is not allowed."""


class MetricsCacheKeyError(GeneralMetricsCacheError):
    """There is no such metric, or no such key in the metrics configuration."""


class MetricTypes(Enum):
    """How the values of a metric are put together."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Dimension:
    """A named property of a value, such as the model it belongs to."""

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def to_dict(self) -> dict[str, str]:
        """Name and value, ready for JSON."""
        return {"Name": self.name, "Value": self.value}


class Sample(NamedTuple):
    """One recorded value.

    Attributes:
        name: of the metric.
        unit: written out ("Milliseconds").
        value: the number recorded.
        dimensions: name and value pairs, in the metric's order.
        metric_type: "counter", "gauge" or "histogram".
        request_ids: the requests it belongs to, joined by commas; "" for none.
    """

    name: str
    unit: str
    value: float
    dimensions: tuple[tuple[str, str], ...]
    metric_type: str
    request_ids: str

    def __str__(self) -> str:
        """The value in the text form of TorchServe's workers, less the "[METRICS]" that begins their line."""
        dimensions = ",".join(f"{name}:{value}" for name, value in self.dimensions)
        tail = f",{self.request_ids}" if self.request_ids else ""
        return (
            f"{self.name}.{self.unit}:{self.value}|#{dimensions}|#type:{self.metric_type.upper()}"
            f"|#hostname:{socket.gethostname()},{int(time.time())}{tail}"
        )


def print_sample(sample: Sample) -> None:
    """Writes a value to stdout; where a metric without a cache goes."""
    print(f"[METRICS]{sample}", flush=True)


class CachingMetric:
    """One metric, and how to record values of it.

    Args:
        metric_name: its name.
        unit: "ms", "count", "MB", … or any other text.
        dimension_names: names of the dimensions each value comes with.
        metric_type: counter, gauge or histogram.
        record: gets each value; prints it by default.
    """

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
        record: Callable[[Sample], None] = print_sample,
    ) -> None:
        self.metric_name = metric_name
        self.unit = UNITS.get(unit, unit)
        self.dimension_names = list(dimension_names)
        self.metric_type = metric_type
        self._record = record

    def __str__(self) -> str:
        return f"{self.metric_type.value} {self.metric_name}.{self.unit} {self.dimension_names}"

    def add_or_update(self, value: float, dimension_values: Sequence[str] = (), request_id: str = "") -> None:
        """Records a value. A wrong number of dimensions or a negative count is logged, and not recorded.

        Args:
            value: the number, in the metric's unit.
            dimension_values: one per dimension name.
            request_id: the requests it belongs to.
        """
        if len(dimension_values) != len(self.dimension_names):
            self._refuse(f"expected values for the dimensions {self.dimension_names}, got {dimension_values}")
            return
        if self.metric_type is MetricTypes.COUNTER and value < 0:
            self._refuse(f"a counter cannot go down, got {value}")
            return
        dimensions = tuple(zip(self.dimension_names, map(str, dimension_values), strict=True))
        self._record(Sample(self.metric_name, self.unit, value, dimensions, self.metric_type.value, request_id))

    def update(self, value: float, request_id: str = "", dimensions: Sequence[Dimension] = ()) -> None:
        """Records a value that brings its dimensions along."""
        if dimensions:
            self.dimension_names = [dimension.name for dimension in dimensions]
        self.add_or_update(value, [dimension.value for dimension in dimensions], request_id)

    def _refuse(self, reason: str) -> None:
        log.error("[METRICS]Failed to update metric with name:%s, reason: %s", self.metric_name, reason)


class MetricsCache:
    """What `context.metrics` is: metrics by type and name, and the values recorded since the last hand-over.

    Args:
        config_file_path: a metrics.yaml whose `model_metrics` are made by `initialize_cache`.
        model_name: value of the dimension ModelName.
    """

    def __init__(self, config_file_path: str | None = None, model_name: str = "") -> None:
        self.config_file_path = config_file_path
        self.model_name = model_name
        self._batch_ids: Mapping[int, str] = {}
        self.cache: dict[MetricTypes, dict[str, CachingMetric]] = {kind: {} for kind in MetricTypes}
        self.store: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def take_samples(self) -> list[Sample]:
        """The values recorded since the last call. A handler's threads may go on recording meanwhile."""
        return [self.store.popleft() for _ in range(len(self.store))]

    @property
    def request_ids(self) -> str:
        """The requests of the current batch, joined by commas."""
        return ",".join(self._batch_ids.values())

    def set_request_ids(self, request_ids: str | Mapping[int, str]) -> None:
        """Names the requests of the current batch: joined by commas, or by row."""
        if isinstance(request_ids, str):
            request_ids = dict(enumerate(request_ids.split(","))) if request_ids else {}
        self._batch_ids = request_ids

    def for_request(self, request_id: str) -> MetricsCache:
        """The same metrics, whose values are those of one request among several that run at the same time."""
        own = copy.copy(self)
        own._batch_ids = {0: request_id}
        return own

    def record(self, sample: Sample) -> None:
        """Keeps a value for the next hand-over."""
        self.store.append(sample)

    def initialize_cache(self) -> None:
        """Makes the metrics of the configuration file's `model_metrics`.

        Raises:
            MetricsCacheTypeError: no file was given.
            MetricsCacheIOError: it cannot be read.
            MetricsCachePyYamlError: it is not YAML.
            MetricsCacheKeyError: a key is missing, or a metric type is unknown.
        """
        for type_name, specs in self._read_specification().items():
            try:
                kind = MetricTypes(type_name)
            except ValueError as error:
                raise MetricsCacheKeyError(f"Invalid metric type: {type_name}") from error
            for spec in specs or ():
                try:
                    name, unit, dimensions = spec["name"], spec["unit"], spec["dimensions"]
                except KeyError as error:
                    raise MetricsCacheKeyError(f"Key not found in cache spec: {error}") from error
                self.add_metric_to_cache(name, unit, dimensions, kind)

    def _read_specification(self) -> dict[str, Any]:
        path = self.config_file_path
        if not path:
            raise MetricsCacheTypeError("Config file not initialized")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MetricsCacheIOError(f"{path}: {error}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise MetricsCachePyYamlError(f"{path}: {error}") from error
        if not isinstance(content, dict) or "model_metrics" not in content:
            raise MetricsCacheKeyError(f"'model_metrics' key not found in yaml file: {path}")
        specification = content["model_metrics"]
        if not isinstance(specification, dict):
            raise MetricsCacheValueError("Missing `model_metrics` specification")
        return specification

    def cache_keys(self) -> list[str]:
        """The names of all metrics."""
        return [name for metrics in self.cache.values() for name in metrics]

    def add_metric_to_cache(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> CachingMetric:
        """Makes a metric, or makes it anew.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
        """
        if not isinstance(metric_name, str):
            raise MetricsCacheTypeError("`metric_name` must be a str")
        if not isinstance(unit, str):
            raise MetricsCacheTypeError("`unit` must be a str")
        if not isinstance(metric_type, MetricTypes):
            raise MetricsCacheTypeError("`metric_type` must be a MetricTypes enum")
        if isinstance(dimension_names, str) or not all(isinstance(name, str) for name in dimension_names):
            raise MetricsCacheTypeError("`dimension_names` should be a list of dimension name strings")
        metric = CachingMetric(metric_name, unit, dimension_names, metric_type, self.record)
        self.cache[metric_type][metric_name] = metric
        return metric

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """The metric of this type and name.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
            MetricsCacheKeyError: there is none.
        """
        if not isinstance(metric_name, str):
            raise MetricsCacheTypeError("`metric_name` must be a str")
        if not isinstance(metric_type, MetricTypes):
            raise MetricsCacheTypeError("`metric_type` must be a MetricTypes enum")
        metric = self.cache[metric_type].get(metric_name)
        if metric is None:
            raise MetricsCacheKeyError(f"Metric of type '{metric_type.value}' and name '{metric_name}' doesn't exist")
        return metric

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str,
        idx: int | None = None,
        dimensions: Sequence[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        """Records a value, and makes the metric where there is none.

        Args:
            name: of the metric.
            value: the number, in `unit`.
            unit: "ms", "count", "MB", … or any other text.
            idx: row of the batch it belongs to, None for all rows.
            dimensions: more dimensions than model and level.
            metric_type: counter, gauge or histogram.
        """
        request_id = self._request_id(idx)
        dimensions = self._with_default_dimensions(dimensions, request_id)
        metric = self.cache[metric_type].get(name)
        names = [dimension.name for dimension in dimensions]
        if metric is None:
            metric = self.add_metric_to_cache(name, unit, names, metric_type)
        by_name = {dimension.name: dimension.value for dimension in dimensions}
        # A metric of the configuration file lists other dimensions besides, such as the host's.
        wanted = metric.dimension_names if set(names) <= set(metric.dimension_names) else names
        metric.add_or_update(value, [by_name[name] for name in wanted if name in by_name], request_id)

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] = ()
    ) -> None:
        """Adds to a counter."""
        self.add_metric(name, value, "count", idx, dimensions)

    def add_time(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "ms",
        dimensions: Sequence[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a duration in "ms" or "s".

        Raises:
            MetricsCacheValueError: another unit.
        """
        if unit not in ("ms", "s"):
            raise MetricsCacheValueError(f"the unit for a timed metric should be one of ms and s, not {unit}")
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_size(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "MB",
        dimensions: Sequence[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a size in "MB", "kB", "GB" or "B".

        Raises:
            MetricsCacheValueError: another unit.
        """
        if unit not in ("MB", "kB", "GB", "B"):
            raise MetricsCacheValueError(f"the unit for a size metric should be one of MB, kB, GB and B, not {unit}")
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_percent(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        dimensions: Sequence[Dimension] = (),
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Records a share in percent."""
        self.add_metric(name, value, "percent", idx, dimensions, metric_type)

    def add_error(self, name: str, value: float, dimensions: Sequence[Dimension] = ()) -> None:
        """Counts an error; it belongs to no request."""
        level = [] if any(d.name == "Level" for d in dimensions) else [Dimension("Level", "Error")]
        self.add_metric(name, value, "", None, [*dimensions, *level])

    def _request_id(self, idx: int | None) -> str:
        request_id = None if idx is None else self._batch_ids.get(idx)
        return self.request_ids if request_id is None else request_id

    def _with_default_dimensions(self, dimensions: Sequence[Dimension], request_id: str) -> list[Dimension]:
        defaults = [Dimension("Level", "Error")]
        if request_id:
            defaults = [Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        given = {dimension.name for dimension in dimensions}
        return [*dimensions, *(default for default in defaults if default.name not in given)]
