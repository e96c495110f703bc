"""A named property of a value."""

from wsgi_ts.handlers.metrics.cache import Dimension

__all__ = ["Dimension"]
