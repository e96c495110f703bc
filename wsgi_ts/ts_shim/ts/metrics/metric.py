"""One value of the older store."""

from wsgi_ts.handlers.metrics.store import Metric
