"""What a worker template imports for its forks, so that each of them has it at once, and all of them share it."""

from __future__ import annotations

import gc
import importlib
import logging
import sys

log = logging.getLogger(__name__)

#: The part that workers seed anew brings all the others.
_NUMPY = "numpy.random"


def import_beforehand(name: str) -> str | None:
    """Imports a module; returns None, or why it cannot be."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a module may raise whatever it likes; its workers will say more
        log.warning("The worker template cannot import %s (%s): handlers that need it will fail", name, error)
        return " ".join(str(error).split()) or type(error).__name__
    return None


def import_numpy() -> None:
    """Imports numpy, before the first worker that has a use for it: many handlers have none."""
    if _NUMPY not in sys.modules:
        import_beforehand(_NUMPY)
        gc.freeze()
