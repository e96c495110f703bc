"""The cache to derive from."""

from wsgi_ts.handlers.metrics import MetricsCache as MetricCacheAbstract

__all__ = ["MetricCacheAbstract"]
