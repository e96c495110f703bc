"""One metric of a handler: its type, its dimensions, and the values recorded of it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

log = logging.getLogger(__name__)
#: The name that log configurations of handlers know.
sample_log = logging.getLogger("ts.metrics.caching_metric")

#: Units by the short form that handlers give.
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
        unit: written out ("Milliseconds").
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
        """Returns the value in the text form of TorchServe's workers, less the "[METRICS]" that begins their line."""
        dimensions = ",".join(f"{name}:{value}" for name, value in self.dimensions)
        tail = f",{self.request_ids}" if self.request_ids else ""
        return (
            f"{self.name}.{self.unit}:{self.value}|#{dimensions}|#type:{self.metric_type.upper()}"
            f"|#hostname:{socket.gethostname()},{int(time.time())}{tail}"
        )


def log_sample(sample: Sample) -> None:
    """Logs a value, as TorchServe's workers do; where a metric without a cache goes."""
    sample_log.info("[METRICS]%s", sample)


class CachingMetric:
    """One metric, and how to record values of it.

    Args:
        unit: "ms", "count", "MB", … or any other text.
        record: gets each value; logs it by default.
    """

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] | None = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
        record: Callable[[Sample], None] = log_sample,
    ) -> None:
        self.metric_name = metric_name
        self.unit = UNITS.get(unit, unit)
        self.dimension_names = list(dimension_names or ())
        self.metric_type = metric_type
        self._record = record

    def __str__(self) -> str:
        return f"{self.metric_type.value} {self.metric_name}.{self.unit} {self.dimension_names}"

    def add_or_update(self, value: float, dimension_values: Sequence[str] = (), request_id: str = "") -> None:
        """Records a value, in the metric's unit, with a value for each dimension.

        A wrong number of dimensions or a negative count is logged, and not recorded.
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
        self.dimension_names = [dimension.name for dimension in dimensions]
        self.add_or_update(value, [dimension.value for dimension in dimensions], request_id)

    def _refuse(self, reason: str) -> None:
        log.error("[METRICS]Failed to update metric with name:%s, reason: %s", self.metric_name, reason)
