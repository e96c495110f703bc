"""The manifest."""

from wsgi_ts.archiver_api import Manifest, RuntimeType

__all__ = ["Manifest", "RuntimeType"]
