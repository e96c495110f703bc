"""Packages that only some handlers need: imported when first used, and named in the error where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from wsgi_ts.handlers.serving.errors import PredictionException

#: Name for pip where it is not the import name.
_DISTRIBUTIONS = {"PIL": "pillow", "nvidia": "nvidia-dali", "tensorrt_llm": "tensorrt-llm"}


def import_extra(module: str, purpose: str) -> Any:
    """Imports a package that only some handlers need.

    Args:
        module: its import name.
        purpose: who needs it, for the message.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        top = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {_DISTRIBUTIONS.get(top, top)}, which cannot be imported here ({error}): "
            f"install it beside torch in the environment of the model workers."
        ) from error


def import_for_explanation(module: str) -> Any:
    """Imports a package that explanations need while a request for one is being answered.

    Raises:
        PredictionException: 501, it cannot be imported; unlike an ImportError its text reaches the client.
    """
    try:
        return import_extra(module, "An explanation")
    except ImportError as error:
        raise PredictionException(str(error), 501) from error
