from wsgi_ts.handlers.metrics.store import Metric
