"""Names of units."""

from wsgi_ts.handlers.metrics import UNITS

__all__ = ["UNITS"]
