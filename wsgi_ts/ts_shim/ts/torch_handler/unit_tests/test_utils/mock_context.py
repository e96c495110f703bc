"""A stand-in for the context."""

from wsgi_ts.handlers.testing import MockContext
