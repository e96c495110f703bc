"""What an exception of a handler becomes: the answer of its batch, or the reason why its model is not loaded.

Exceptions are users' code, too: asked for their text, they may raise again.
"""

from __future__ import annotations

import logging
import sys
import traceback

from wsgi_ts.handlers.serving.errors import BatchFailure, LoadError, PredictionException
from wsgi_ts.handlers.serving.results import (
    BODYLESS_STATUSES,
    OUT_OF_RESOURCES,
    PREDICTION_FAILED,
    Answer,
    error_answer,
    status_of,
)

log = logging.getLogger(__name__)

_MOST_FAULT = 300


def batch_answer(error: BaseException, model_name: str) -> Answer:
    """Returns the answer of each request of a batch that raised this, `BatchFailure` for what it returned; logs why."""
    if isinstance(error, BatchFailure):
        log.warning("Model %s: %s.", model_name, error)
        return error_answer(503, error.message)
    _log_failure(error)
    if isinstance(error, PredictionException):
        status = status_of(error.error_code) or 500
        return error_answer(500 if status in BODYLESS_STATUSES else status, str(error.message))
    if isinstance(error, MemoryError) or "CUDA" in _text_of(error):
        return error_answer(507, OUT_OF_RESOURCES)
    return error_answer(503, PREDICTION_FAILED)


def load_error(error: BaseException) -> LoadError | None:
    """Returns the status that TorchServe has for an exception of a handler's initialisation, None where it has none.

    The traceback goes to stderr, each line by itself: the worker's log takes one line a record.
    """
    for block in traceback.format_exception(type(error), error, error.__traceback__):
        for line in block.rstrip("\n").split("\n"):
            print(line, file=sys.stderr)
    sys.stderr.flush()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "CUDA" in _text_of(error)):
        return LoadError(507, "System out of memory")
    return LoadError(500, "Unknown exception") if isinstance(error, RuntimeError) else None


def has_broken_gpu(error: BaseException) -> bool:
    """Returns whether this process can no longer compute on its GPU: after a device-side assert it cannot."""
    if isinstance(error, BatchFailure | PredictionException | MemoryError) or "CUDA" not in _text_of(error):
        return False
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return float(torch.ones(1, device="cuda").add_(1).item()) != 2.0
    except BaseException as second:
        # An allocation that fails for lack of memory leaves the context intact.
        return type(second).__name__ != "OutOfMemoryError"


def fault_of(error: BaseException) -> str:
    """Returns an exception in one line, for the trace of its batch."""
    text = " ".join(_text_of(error).split())
    return f"{type(error).__name__}: {text[:_MOST_FAULT]}" if text else type(error).__name__


def ran_out_of_memory(error: BaseException) -> bool:
    """Returns whether the batch was too large for the memory, of the GPU or of the machine; frees what torch keeps."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if not isinstance(error, MemoryError) and "OutOfMemoryError" not in names:
        return isinstance(error, RuntimeError) and "can't allocate memory" in _text_of(error)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return True


def _log_failure(error: BaseException) -> None:
    """Writes the traceback under the line that TorchServe has for such an exception."""
    level, line = logging.WARNING, "Invoking custom service failed."
    if isinstance(error, MemoryError):
        level, line = logging.ERROR, "System out of memory"
    elif isinstance(error, PredictionException):
        level, line = logging.ERROR, "Prediction error"
    elif "CUDA" in _text_of(error):
        level, line = logging.ERROR, "CUDA out of memory"
    try:
        log.log(level, line, exc_info=error)
    except BaseException as second:
        names = f"{type(error).__name__}, {type(second).__name__} when logged"
        print(f"Invoking custom service failed: {names}", file=sys.stderr)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:
        return f"{type(error).__name__} whose text raised {type(second).__name__}"
