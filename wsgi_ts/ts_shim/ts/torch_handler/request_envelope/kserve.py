"""KServe's v1 protocol."""

from wsgi_ts.handlers.serving.envelopes import KServeEnvelope
