"""Bodies as they are."""

from wsgi_ts.handlers.envelopes import BodyEnvelope

__all__ = ["BodyEnvelope"]
