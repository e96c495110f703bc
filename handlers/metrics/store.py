"""TorchServe's older way to record metrics: a store of `Metric` objects, written out by `emit_metrics`."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wsgi_ts.handlers.metrics.metric import CachingMetric, Dimension, MetricTypes
from wsgi_ts.handlers.metrics.recorder import Recorder

#: The name that log configurations of handlers know.
log = logging.getLogger("ts.service")


class Metric:
    """One value with its unit, dimensions and request.

    Args:
        unit: "ms", "count", "MB", … or any other text.
        dimensions: what the value belongs to.
        request_id: the request, or several joined by commas.
        metric_method: "counter" or None; kept, and not looked at.
    """

    def __init__(
        self,
        name: str,
        value: float,
        unit: str,
        dimensions: list[Dimension],
        request_id: str | None = None,
        metric_method: str | None = None,
    ) -> None:
        self._series = CachingMetric(name, unit, [dimension.name for dimension in dimensions])
        self.name = name
        self.value = value
        self.unit = self._series.unit
        self.dimensions = dimensions
        self.request_id = request_id
        self.metric_method = metric_method

    def __str__(self) -> str:
        dimensions = ",".join(map(str, self.dimensions))
        tail = f",{self.request_id}" if self.request_id else ""
        place = f"hostname:{socket.gethostname()},{int(time.time())}"
        return f"{self.name}.{self.unit}:{self.value}|#{dimensions}|#{place}{tail}"

    def update(self, value: float) -> None:
        """Logs one more value: the server adds those of a counter up. `value` stays the first one."""
        self._series.add_or_update(value, [dimension.value for dimension in self.dimensions], self.request_id or "")

    def reset(self) -> None:
        """Logs the value 0."""
        self.update(0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the metric, ready for JSON through `MetricEncoder`."""
        return {
            "MetricName": self.name,
            "Value": self.value,
            "Unit": self.unit,
            "Dimensions": self.dimensions,
            "Timestamp": int(time.time()),
            "HostName": socket.gethostname(),
            "RequestId": self.request_id,
        }


class MetricEncoder(json.JSONEncoder):
    """Makes JSON of metrics and dimensions."""

    def default(self, o: Any) -> Any:
        """Returns the dict that stands for a metric or dimension."""
        return o.to_dict() if isinstance(o, (Metric, Dimension)) else super().default(o)


class MetricsStore(Recorder):
    """Collects the metrics of one batch.

    Args:
        request_ids: row -> request id, or None outside a request; anything else is the id of every row.
        model_name: value of the dimension ModelName.
    """

    def __init__(self, request_ids: object, model_name: str) -> None:
        self.request_ids = request_ids
        self.model_name = model_name
        self.store: list[Metric] = []
        self.cache: dict[str, Metric] = {}

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str,
        idx: int | None = None,
        dimensions: Sequence[Dimension] | None = (),
        metric_type: MetricTypes | None = None,
    ) -> None:
        """Records a value: the first of its kind in `store`, each further one in the log. See `Recorder`.

        Raises:
            ValueError: the dimensions are no list.
        """
        method = "counter" if metric_type is MetricTypes.COUNTER else None
        self._add_or_update(name, value, self._request_id(idx), unit, method, dimensions)

    def add_error(self, name: str, value: Any, dimensions: Sequence[Dimension] | None = ()) -> None:
        """Records an error; it belongs to no request."""
        self._add_or_update(name, value, None, "", None, dimensions)

    def _request_id(self, idx: int | None) -> str | None:
        if self.request_ids is None:
            return None
        if not isinstance(self.request_ids, Mapping):
            return str(self.request_ids)
        if idx is not None and idx in self.request_ids:
            return str(self.request_ids[idx])
        return ",".join(map(str, self.request_ids.values()))

    def _add_or_update(
        self,
        name: str,
        value: float,
        request_id: str | None,
        unit: str,
        method: str | None,
        dimensions: Sequence[Dimension] | None,
    ) -> None:
        if dimensions and not isinstance(dimensions, list):
            raise ValueError("Please provide a list of dimensions")
        defaults = [Dimension("Level", "Error")]
        if request_id is not None:
            defaults = [Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        all_dimensions = [*(dimensions or ()), *defaults]
        key = "-".join([name, unit, str(request_id), *map(str, all_dimensions)])
        metric = self.cache.get(key)
        if metric is None:
            metric = Metric(name, value, unit, all_dimensions, request_id, method)
            self.cache[key] = metric
            self.store.append(metric)
        else:
            metric.update(value)


def emit_metrics(metrics: Iterable[object] | None) -> None:
    """Logs metrics in the text form of TorchServe's workers, one a line."""
    for metric in metrics or ():
        log.info("[METRICS]%s", metric)
