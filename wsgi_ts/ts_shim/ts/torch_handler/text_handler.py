"""Base of the text handlers."""

from wsgi_ts.handlers.bundled.text import TextHandler
