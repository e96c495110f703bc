"""Names of units."""

from wsgi_ts.handlers.metrics.cache import UNITS

__all__ = ["UNITS"]
