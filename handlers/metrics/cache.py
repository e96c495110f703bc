"""What `context.metrics` is: the metrics of a handler.

A value is kept in memory until the service hands all of them over, once per batch; nothing is printed.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from wsgi_ts.handlers.metrics.errors import (
    MetricsCacheIOError,
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)
from wsgi_ts.handlers.metrics.metric import CachingMetric, Dimension, MetricTypes, Sample
from wsgi_ts.handlers.metrics.recorder import Recorder

#: Values kept at most between two hand-overs; the oldest go first.
MAX_SAMPLES = 10_000
#: PredictionTime and HandlerTime are recorded for one batch in so many seconds: at thousands of batches a second a
#: line for each would cost more than the inference.
SAMPLE_INTERVAL_S = 0.1
#: libyaml's, ten times as fast, where PyYAML was built with it: each model worker reads its metrics.yaml at its start.
_Loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_TYPE = "`metric_type` must be a MetricTypes enum"


class MetricsCache(Recorder):
    """Metrics by type and name, those of a metrics.yaml too, and the values recorded since the last hand-over."""

    def __init__(self, config_file_path: str | None = None, model_name: str = "") -> None:
        self.config_file_path = config_file_path
        self.model_name = model_name
        self._request_ids: str | Mapping[int, str] = {}
        self._batch_ids: Mapping[int, str] = {}
        self._parsed_file: dict[str, Any] | None = None
        self.cache: dict[MetricTypes, dict[str, CachingMetric]] = {kind: {} for kind in MetricTypes}
        self.store: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def take_samples(self) -> list[Sample]:
        """Returns the values recorded since the last call. A handler's threads may go on recording meanwhile."""
        return [self.store.popleft() for _ in range(len(self.store))]

    @property
    def request_ids(self) -> str | Mapping[int, str]:
        """The requests of the current batch: row -> id, or what else was set, such as the ids joined by commas."""
        return self._request_ids

    @request_ids.setter
    def request_ids(self, request_ids: str | Mapping[int, str]) -> None:
        self.set_request_ids(request_ids)

    def set_request_ids(self, request_ids: str | Mapping[int, str]) -> None:
        """Names the requests of the current batch: joined by commas, or by row."""
        self._request_ids = request_ids
        if isinstance(request_ids, str):
            request_ids = dict(enumerate(request_ids.split(","))) if request_ids else {}
        self._batch_ids = request_ids

    def for_request(self, request_id: str) -> MetricsCache:
        """Returns the same metrics, whose values are those of one request among several that run at the same time."""
        own = copy.copy(self)
        own.set_request_ids({0: request_id})
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
        if self._parsed_file is None:
            self._parse_yaml_file(self.config_file_path)
        section = self._parse_metrics_section()
        if not isinstance(section, dict) or not section:
            raise MetricsCacheValueError("Missing `model_metrics` specification")
        for type_name, specs in section.items():
            try:
                kind = MetricTypes(type_name)
            except ValueError as error:
                raise MetricsCacheKeyError(f"Invalid metric type: {error}") from error
            for spec in specs or ():
                try:
                    name, unit, dimensions = spec["name"], spec["unit"], spec["dimensions"]
                except KeyError as error:
                    raise MetricsCacheKeyError(f"Key not found in cache spec: {error}") from error
                self.add_metric_to_cache(name, unit, dimensions, kind)

    def _parse_yaml_file(self, config_file_path: str | None) -> None:
        """Reads the configuration; raises as `initialize_cache`."""
        if not config_file_path:
            raise MetricsCacheTypeError("Config file not initialized")
        try:
            content = yaml.load(Path(config_file_path).read_text(encoding="utf-8"), _Loader)
        except OSError as error:
            raise MetricsCacheIOError(f"Error reading file {config_file_path}: {error}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise MetricsCachePyYamlError(f"Error parsing file {config_file_path}: {error}") from error
        self._parsed_file = content if isinstance(content, dict) else {}

    def _parse_metrics_section(self, key: str = "model_metrics") -> Any:
        """Returns a section of the configuration that was read.

        Raises:
            MetricsCacheKeyError: it has none of this name.
        """
        try:
            return (self._parsed_file or {})[key]
        except KeyError as error:
            raise MetricsCacheKeyError(f"'{key}' key not found in yaml file: {error}") from error

    def cache_keys(self) -> list[str]:
        """Returns type and name of all metrics (`gauge:HandlerTime`)."""
        return [f"{kind.value}:{name}" for kind, metrics in self.cache.items() for name in metrics]

    def add_metric_to_cache(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] | None = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> CachingMetric:
        """Makes a metric, or makes it anew.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
        """
        _check(metric_name, str, "`metric_name` must be a str")
        _check(unit, str, "`unit` must be a str")
        _check(metric_type, MetricTypes, _NO_TYPE)
        dimension_names = dimension_names or ()
        if isinstance(dimension_names, str) or not all(isinstance(name, str) for name in dimension_names):
            raise MetricsCacheTypeError("`dimension_names` should be a list of dimension name strings")
        metric = CachingMetric(metric_name, unit, dimension_names, metric_type, self.record)
        self.cache[metric_type][metric_name] = metric
        return metric

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """Returns the metric of this type and name.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
            MetricsCacheKeyError: there is none.
        """
        _check(metric_name, str, "`metric_name` must be a str")
        _check(metric_type, MetricTypes, _NO_TYPE)
        metric = self.cache[metric_type].get(metric_name)
        if metric is None:
            raise MetricsCacheKeyError(f"Metric of type '{metric_type}' and name '{metric_name}' doesn't exist")
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
        """Records a value, and makes the metric where there is none; see `Recorder`."""
        self._record(name, value, unit, self._request_id(idx), dimensions, metric_type)

    def _record(
        self,
        name: str,
        value: float,
        unit: str,
        request_id: str,
        dimensions: Sequence[Dimension],
        metric_type: MetricTypes,
    ) -> None:
        """Records a value for the requests with this id text; empty: for none."""
        dimensions = self._with_default_dimensions(dimensions, request_id)
        names = [dimension.name for dimension in dimensions]
        metric = self.cache[metric_type].get(name) or self.add_metric_to_cache(name, unit, names, metric_type)
        by_name = {dimension.name: dimension.value for dimension in dimensions}
        # A metric of the configuration file lists other dimensions besides, such as the host's.
        wanted = metric.dimension_names if set(names) <= set(metric.dimension_names) else names
        metric.add_or_update(value, [by_name[name] for name in wanted if name in by_name], request_id)

    def add_error(self, name: str, value: float, dimensions: Sequence[Dimension] = ()) -> None:
        """Counts an error; it belongs to no request."""
        self._record(name, value, "", "", dimensions, MetricTypes.COUNTER)

    def _request_id(self, idx: int | None) -> str:
        request_id = None if idx is None else self._batch_ids.get(idx)
        return ",".join(self._batch_ids.values()) if request_id is None else request_id

    def _with_default_dimensions(self, dimensions: Sequence[Dimension], request_id: str) -> list[Dimension]:
        defaults = [Dimension("Level", "Error")]
        if request_id:
            defaults = [Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        given = {dimension.name for dimension in dimensions}
        complete = dimensions if isinstance(dimensions, list) else list(dimensions)
        # Into the caller's own list, as in TorchServe: handlers give it to `CachingMetric.update` afterwards.
        complete.extend(default for default in defaults if default.name not in given)
        return complete


def _check(value: object, wanted: type, message: str) -> None:
    if not isinstance(value, wanted):
        raise MetricsCacheTypeError(message)
