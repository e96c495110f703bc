"""A cache of metrics, made from a metrics.yaml."""

from wsgi_ts.handlers.torchserve.metrics_cache import LoggedMetricsCache as MetricsCacheYamlImpl
