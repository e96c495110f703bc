"""Text classification."""

from wsgi_ts.handlers.text import TextClassifier

__all__ = ["TextClassifier"]
