"""Base of the text handlers."""

from wsgi_ts.handlers.text import TextHandler

__all__ = ["TextHandler"]
