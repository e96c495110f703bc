"""The calls by which handlers record counts, times, sizes and shares, whatever keeps the values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from wsgi_ts.handlers.metrics.errors import MetricsCacheValueError
from wsgi_ts.handlers.metrics.metric import Dimension, MetricTypes


class Recorder(ABC):
    """What `MetricsCache` and the older `MetricsStore` have in common.

    Arguments have the same meaning in all calls:
        name: of the metric.
        value: the number, in `unit`.
        unit: "ms", "count", "MB", … or any other text.
        idx: row of the batch that the value belongs to, None for all rows.
        dimensions: more dimensions than model and level.
        metric_type: counter, gauge or histogram.
    """

    @abstractmethod
    def add_metric(self, name: str, value: float, unit: str, *others: Any, **named: Any) -> None:
        """Records a value, and makes the metric where there is none; `others`: idx, dimensions, metric_type."""

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] = ()
    ) -> None:
        """Adds to a counter."""
        self.add_metric(name, value, "count", idx, dimensions, MetricTypes.COUNTER)

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
            MetricsCacheValueError: another unit; a ValueError, too.
        """
        if unit not in ("ms", "s"):
            raise MetricsCacheValueError("the unit for a timed metric should be one of ['ms', 's']")
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
            MetricsCacheValueError: another unit; a ValueError, too.
        """
        if unit not in ("MB", "kB", "GB", "B"):
            raise MetricsCacheValueError("The unit for size based metric is one of ['MB','kB', 'GB', 'B']")
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
