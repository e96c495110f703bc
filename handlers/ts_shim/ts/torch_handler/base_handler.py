"""The handler to derive from."""

from wsgi_ts.handlers.base import BaseHandler

__all__ = ["BaseHandler"]
