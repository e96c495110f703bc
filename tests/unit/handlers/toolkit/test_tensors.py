"""Tensors of nested lists are those that torch makes itself, in type, shape and value; so are its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsgi_ts.handlers.toolkit.tensors import as_tensor

NUMBERS = st.one_of(st.floats(), st.integers(), st.integers(-9, 9), st.booleans())
ROWS = st.one_of(
    *(st.lists(NUMBERS), st.lists(st.lists(NUMBERS, min_size=2, max_size=2)), st.lists(st.lists(NUMBERS))),
    *(st.lists(st.lists(kind, min_size=3, max_size=3)) for kind in (st.floats(), st.integers(-9, 9), st.booleans())),
)


def outcome(make: Any, data: Any) -> Any:
    try:
        tensor = make(data, device="cpu")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        return type(error), str(error)
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


@given(ROWS)
def test_lists_of_numbers(data: Any) -> None:
    assert outcome(as_tensor, data) == outcome(torch.as_tensor, data)


@pytest.mark.parametrize(
    "data",
    [
        *([], [[]], [[], []], [[1.0], [2.0, 3.0]], [["a"]], [[None]], None, 1.5, "a", [[1.0], "a"], [[1], [None]]),
        *([[1 << 63]], [[1 << 63, -1]], [[0.5, 1 << 70]], [[1e300]], [[float("nan"), float("inf")]], [[1, 0.5]]),
        *([[True, 2]], [[True, 0.5]], [True, False], [[[1]], [[2]]], [[(1, 2)], [(3, 4)]], ((1, 2), (3, 4)), [[1j]]),
        *([np.float32(1.5)], [np.int8(3)], np.ones((2, 2)), [torch.tensor(1), torch.tensor(2)]),
        *([[0.1, 0.2]], [[16777217, 1]], [[16777217, 1.0]]),
    ],
)
def test_as_torch_does(data: Any) -> None:
    assert outcome(as_tensor, data) == outcome(torch.as_tensor, data)


def test_another_default_type() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert as_tensor([[0.1]], "cpu").dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_tensor_may_be_written_to() -> None:
    rows = [[1, 2], [3, 4]]
    as_tensor(rows, "cpu").zero_()
    assert rows == [[1, 2], [3, 4]]
