"""One value of the older store."""

from wsgi_ts.handlers.metrics_store import Metric

__all__ = ["Metric"]
