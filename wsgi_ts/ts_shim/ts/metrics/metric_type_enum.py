from wsgi_ts.handlers.metrics.metric import MetricTypes
