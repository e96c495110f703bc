from wsgi_ts.handlers.metrics.cache import MetricsCache as MetricCacheAbstract
