"""Counter, gauge, histogram."""

from wsgi_ts.handlers.metrics.cache import MetricTypes

__all__ = ["MetricTypes"]
