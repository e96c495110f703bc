"""Context of a handler."""

from wsgi_ts.handlers.serving.context import Context, RequestProcessor
