"""How long a handler's phases take, as `ts_handler_{method}` (ms), where the model's YAML asks for it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Attribute of a method that is measured only once `measure_phases` has found that it is wanted.
_IS_PHASE = "_wsgi_ts_is_phase"


def timed(function: _Function) -> _Function:
    """Measures a method as `ts_handler_{method}` (ms) if the model's YAML says `handler: {profile: true}`.

    The method's object needs the `context` it was initialised with. What the method has a GPU do is part of its time.
    """

    @functools.wraps(function)
    def measure(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = getattr(self, "context", None)
        if context is None or not _is_wanted(context):
            return function(self, *args, **kwargs)
        _wait_for_gpu()
        started_at = time.perf_counter()
        result = function(self, *args, **kwargs)
        _wait_for_gpu()
        elapsed_ms = (time.perf_counter() - started_at) * 1000
        context.metrics.add_time(f"ts_handler_{function.__name__}", round(elapsed_ms, 2), unit="ms")
        return result

    return cast(_Function, measure)


def _wait_for_gpu() -> None:
    """Waits until the GPU has done what it was given: it works on after the call that gave it the work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def phase(function: _Function) -> _Function:
    """Marks a method of a bundled handler: `timed` once `measure_phases` says so, until then as it is, at no cost."""
    setattr(function, _IS_PHASE, True)
    return function


def measure_phases(handler: type, context: Any) -> None:
    """Makes the phases of a handler's class, and of those that it is derived from, `timed` if the model's YAML says so.

    It is the classes that are changed, so that what a derived class calls by `super()` is measured, too; a model worker
    has one handler.
    """
    if not _is_wanted(context):
        return
    for kind in handler.__mro__:
        for name, method in list(vars(kind).items()):
            if isinstance(method, FunctionType) and hasattr(method, _IS_PHASE):
                delattr(method, _IS_PHASE)
                setattr(kind, name, timed(method))


def _is_wanted(context: Any) -> bool:
    section = (getattr(context, "model_yaml_config", None) or {}).get("handler")
    return isinstance(section, dict) and bool(section.get("profile"))
