from wsgi_ts.handlers.serving.envelopes import BodyEnvelope
