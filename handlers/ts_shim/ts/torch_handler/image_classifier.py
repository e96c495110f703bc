"""Image classification."""

from wsgi_ts.handlers.image import ImageClassifier

__all__ = ["ImageClassifier"]
