"""Image segmentation."""

from wsgi_ts.handlers.image import ImageSegmenter

__all__ = ["ImageSegmenter"]
