"""The manifest."""

from wsgi_ts.archiver.torchserve_api import Manifest, RuntimeType

__all__ = ["Manifest", "RuntimeType"]
