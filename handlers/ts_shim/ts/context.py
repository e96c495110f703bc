"""Context of a handler."""

from wsgi_ts.handlers.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
