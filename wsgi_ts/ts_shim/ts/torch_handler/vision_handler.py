"""Base of the image handlers."""

from wsgi_ts.handlers.bundled.vision import VisionHandler
