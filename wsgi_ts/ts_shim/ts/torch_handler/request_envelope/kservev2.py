from wsgi_ts.handlers.serving.envelopes import KServev2Envelope
