"""The bundled handler `densenet_handler`: a module with a function `handle` for an entry point."""

from __future__ import annotations

from typing import Any

from wsgi_ts.handlers.bundled.image import ImageClassifier
from wsgi_ts.handlers.serving.context import Context


class DenseNetHandler(ImageClassifier):
    """An image classifier for models such as DenseNet-161."""


_service = DenseNetHandler()


def handle(data: list[dict[str, Any]] | None, context: Context) -> Any:
    """Loads the model when called without data (None), and else answers a batch of B rows with an image each.

    Returns:
        B dicts label -> probability, None after loading.
    """
    if not _service.initialized:
        _service.initialize(context)
    return None if data is None else _service.handle(data, context)
