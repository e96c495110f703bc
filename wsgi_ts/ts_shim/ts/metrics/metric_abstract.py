"""The metric to derive from."""

from wsgi_ts.handlers.metrics.cache import CachingMetric as MetricAbstract

__all__ = ["MetricAbstract"]
