from wsgi_ts.handlers.bundled.dali import DALIImageClassifier
