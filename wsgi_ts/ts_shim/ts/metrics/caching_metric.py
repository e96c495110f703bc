"""One metric of the cache."""

from wsgi_ts.handlers.metrics.cache import CachingMetric

__all__ = ["CachingMetric"]
