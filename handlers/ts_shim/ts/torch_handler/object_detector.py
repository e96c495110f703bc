"""Object detection."""

from wsgi_ts.handlers.image import ObjectDetector

__all__ = ["ObjectDetector"]
