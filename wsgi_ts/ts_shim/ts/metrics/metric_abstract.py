from wsgi_ts.handlers.metrics.metric import CachingMetric as MetricAbstract
