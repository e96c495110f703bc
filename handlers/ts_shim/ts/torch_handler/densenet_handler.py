"""Image classification through a function."""

from wsgi_ts.handlers.densenet import DenseNetHandler, handle

__all__ = ["DenseNetHandler", "handle"]
