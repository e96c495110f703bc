"""A named property of a value."""

from wsgi_ts.handlers.metrics.metric import Dimension
