"""The older store."""

from wsgi_ts.handlers.metrics_store import MetricsStore

__all__ = ["MetricsStore"]
