"""Tests that need a GPU: `pytest tests/gpu`. Where there is none they are skipped, and say why."""

from __future__ import annotations

import pytest

from wsgi_ts.gpu.devices import gpu_count


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many GPUs the server will find."""
    count = gpu_count(None)
    if not count:
        pytest.skip("no NVIDIA GPU: nvidia-smi is missing, fails or lists none (CUDA_VISIBLE_DEVICES counts)")
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} cannot use the GPU: install a build for CUDA, and its driver")
    return count
