"""Timing of methods."""

from wsgi_ts.handlers.utils import timed

__all__ = ["timed"]
