"""What `context.metrics` is."""

from wsgi_ts.handlers.metrics import MetricsCache as MetricsCacheYamlImpl

__all__ = ["MetricsCacheYamlImpl"]
