"""A batch in parts: the arguments of one call become those of several, and their results one result.

`torch.distributed.pipelining.microbatch` cuts every tensor, also a table that has no row per request, refuses numbers
without dimensions, and joins results that are tensors throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wsgi_ts.handlers.toolkit.library_names import ROW_INPUTS, SHARED_INPUTS


def split_rows(
    args: Sequence[Any], kwargs: Mapping[str, Any], chunks: int
) -> list[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Cuts one call's arguments into those of at most `chunks` calls, each with one row of the batch or more.

    The batch is the first dimension of what transformers calls the model's inputs, or else of the first tensor; tensors
    of that length are cut, all else is in each part.
    """
    first = [kwargs[name] for name in ROW_INPUTS if kwargs.get(name) is not None]
    tensors = [value for value in (*first, *args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim]
    if chunks == 1 or not tensors or len(tensors[0]) < 2:
        return [(args, kwargs)]
    rows = len(tensors[0])
    parts = len(tensors[0].chunk(chunks))

    def shares(value: Any) -> Sequence[Any]:
        is_cut = isinstance(value, torch.Tensor) and value.ndim and len(value) == rows
        return value.chunk(chunks) if is_cut else [value] * parts

    positional = [shares(value) for value in args]
    named = {name: [value] * parts if name in SHARED_INPUTS else shares(value) for name, value in kwargs.items()}
    return [
        ([share[part] for share in positional], {name: share[part] for name, share in named.items()})
        for part in range(parts)
    ]


def merge_rows(parts: Sequence[Any]) -> Any:
    """Joins the results of the parts of a batch, tensor by tensor; what is no tensor is taken from the first part.

    Raises:
        ValueError: a tensor has no rows.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        if not first.ndim:
            raise ValueError("the model returns a value for the whole batch: set pippy.chunks to 1")
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return type(first)({name: merge_rows([part[name] for part in parts]) for name in first})
    if isinstance(first, list | tuple):
        return type(first)(merge_rows(items) for items in zip(*parts, strict=True))
    return first
