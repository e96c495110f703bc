"""The handler to derive from."""

from wsgi_ts.handlers.bundled.base import BaseHandler
