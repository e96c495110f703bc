"""Image classification with a DALI pipeline."""

from wsgi_ts.handlers.dali import DALIImageClassifier

__all__ = ["DALIImageClassifier"]
