"""Base of the image handlers."""

from wsgi_ts.handlers.vision import VisionHandler

__all__ = ["VisionHandler"]
