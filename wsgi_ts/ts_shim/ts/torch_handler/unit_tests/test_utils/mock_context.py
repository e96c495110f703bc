from wsgi_ts.handlers.testing import MockContext
