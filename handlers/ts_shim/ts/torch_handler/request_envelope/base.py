"""Base of the envelopes."""

from wsgi_ts.handlers.envelopes import BaseEnvelope

__all__ = ["BaseEnvelope"]
