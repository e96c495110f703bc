"""The cache to derive from."""

from wsgi_ts.handlers.metrics.cache import MetricsCache as MetricCacheAbstract
