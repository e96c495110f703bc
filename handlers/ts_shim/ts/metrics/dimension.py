"""A named property of a value."""

from wsgi_ts.handlers.metrics import Dimension

__all__ = ["Dimension"]
