"""`generate` of transformers for a model in stages: its loop runs where the driver is, each step on all stages."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def generate(
    model: nn.Module,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Runs a model's `generate` with another `forward`.

    Raises:
        TypeError: the model has no `generate`.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"{type(model).__name__} has no generate: call the driver in a loop of your own")
    # The stage's own modules, in another shell: the stage is called while this runs.
    shell: Any = copy.copy(model)

    @functools.wraps(model.forward)  # generate looks at its parameters
    def forward(*inputs: Any, **named: Any) -> Any:
        return call(*inputs, **named)

    shell.forward = forward
    return shell.generate(*args, **kwargs)
