from wsgi_ts.handlers.bundled.densenet import DenseNetHandler, handle
