"""Tensors of what requests bring."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: numpy makes a float of a whole number beyond this, where torch raises.
_INT64_LIMIT = float(1 << 63)


def as_tensor(data: Any, device: Any) -> torch.Tensor:
    """Returns what `torch.as_tensor(data, device=device)` does; of nested lists in a fraction of its time.

    Args:
        data: numbers in lists of lists, of any depth, such as the rows of a batch; or whatever else torch takes.
        device: where the tensor is to be.

    Returns:
        Tensor in the shape of the lists: bool, int64, or torch's default type for floats.

    Raises:
        ValueError, TypeError, RuntimeError: torch makes no tensor of it: no numbers, or lists of different lengths.
    """
    array = _array(data)
    if array is None:
        return torch.as_tensor(data, device=device)
    dtype = torch.get_default_dtype() if array.dtype == np.float64 else None
    return torch.from_numpy(array).to(device=device, dtype=dtype)


def _array(data: Any) -> npt.NDArray[Any] | None:
    """Nested lists of Python's numbers as numpy reads them; None where torch would see something else in them."""
    leaf = data
    while type(leaf) is list and leaf:
        leaf = leaf[0]
    if type(data) is not list or type(leaf) not in (float, int, bool) or len(set(map(type, data))) != 1:
        return None
    try:
        array = np.array(data)
    except (ValueError, OverflowError):
        return None
    if array.dtype == np.float64:
        return array if np.abs(array).max(initial=0.0) < _INT64_LIMIT else None
    return array if array.dtype in (np.int64, np.bool_) else None
