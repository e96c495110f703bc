"""JSON of metrics."""

from wsgi_ts.handlers.metrics_store import MetricEncoder

__all__ = ["MetricEncoder"]
