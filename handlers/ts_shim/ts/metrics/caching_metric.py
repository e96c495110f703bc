"""One metric of the cache."""

from wsgi_ts.handlers.metrics import CachingMetric

__all__ = ["CachingMetric"]
