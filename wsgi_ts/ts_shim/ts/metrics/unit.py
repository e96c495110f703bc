from wsgi_ts.handlers.metrics.metric import UNITS
