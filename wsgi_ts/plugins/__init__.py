"""Plugins: code of users that the server loads; `from wsgi_ts.plugins import endpoint`. See docs/plugins.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgi_ts.plugins.api import *  # noqa: F403
    from wsgi_ts.plugins.api import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Gets what the API has by that name: imported only for plugins, since most servers have none."""
    api = import_module("wsgi_ts.plugins.api")
    if name == "__all__" or name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
