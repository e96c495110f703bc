"""What a rank says that it computes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wsgi_ts.batcher.worker.batch_traces import device_of, gpu_of


def test_a_handler_s_own_device_counts() -> None:
    assert device_of(SimpleNamespace(device=torch.device("cuda", 1))) == "cuda:1"
    assert device_of(SimpleNamespace(device="cpu")) == "cpu"
    assert device_of(SimpleNamespace(device="x" * 1000)) == "x" * 64


def test_without_one_it_is_the_cpu_until_cuda_is_in_use() -> None:
    assert not torch.cuda.is_initialized()
    assert device_of(SimpleNamespace()) == "cpu"


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [
        ("cuda:1", "2,3", "3"),
        ("cuda", "2,3", "2"),
        ("cuda:1", "GPU-a, GPU-b", "GPU-b"),
        ("cuda:2", "2,3", None),
        ("cuda:1", None, None),
        ("cpu", "2,3", None),
        ("cuda:one", "2,3", None),
    ],
)
def test_the_gpu_is_named_as_the_driver_does(device: str, seen: str | None, expected: str | None) -> None:
    assert gpu_of(device, {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}) == expected
