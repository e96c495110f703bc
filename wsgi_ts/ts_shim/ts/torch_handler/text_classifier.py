from wsgi_ts.handlers.bundled.text import TextClassifier
