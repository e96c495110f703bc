"""Plugins: code of users that the server loads; `from wsgi_ts.plugins import endpoint`. See docs/plugins.md."""

from wsgi_ts.plugins.api import *  # noqa: F403
from wsgi_ts.plugins.api import __all__ as __all__
