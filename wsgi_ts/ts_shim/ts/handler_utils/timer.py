"""Timing of methods."""

from wsgi_ts.handlers.toolkit.utils import timed

__all__ = ["timed"]
