"""KServe's v2 protocol."""

from wsgi_ts.handlers.envelopes import KServev2Envelope

__all__ = ["KServev2Envelope"]
