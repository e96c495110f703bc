"""Counter, gauge, histogram."""

from wsgi_ts.handlers.metrics import MetricTypes

__all__ = ["MetricTypes"]
