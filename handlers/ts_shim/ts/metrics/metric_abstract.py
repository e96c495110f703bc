"""The metric to derive from."""

from wsgi_ts.handlers.metrics import CachingMetric as MetricAbstract

__all__ = ["MetricAbstract"]
