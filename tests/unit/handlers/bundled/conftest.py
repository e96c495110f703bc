"""A stand-in for NVIDIA DALI."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class Output:
    """A batch as DALI returns it."""

    def __init__(self, images: list[Any]) -> None:
        self._images = images

    def as_cpu(self) -> Output:
        return self

    def at(self, row: int) -> Any:
        return self._images[row]


class Pipeline:
    """Decodes each image to the mean of its bytes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    @classmethod
    def deserialize(cls, **options: Any) -> Pipeline:
        return cls(options)

    def run(self, source: list[Any]) -> tuple[Output]:
        return (Output([np.float32([image.mean(), 0.0]) for image in source]),)


@pytest.fixture
def dali(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia", "nvidia.dali", "nvidia.dali.pipeline"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["nvidia.dali.pipeline"], "Pipeline", Pipeline, raising=False)
