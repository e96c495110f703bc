"""Instances in, predictions out."""

from wsgi_ts.handlers.envelopes import JSONEnvelope

__all__ = ["JSONEnvelope"]
