from wsgi_ts.handlers.bundled.base import BaseHandler
