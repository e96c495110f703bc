"""One metric of the cache."""

from wsgi_ts.handlers.metrics.metric import CachingMetric
