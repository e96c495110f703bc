"""Image classification with a DALI pipeline."""

from wsgi_ts.handlers.bundled.dali import DALIImageClassifier
