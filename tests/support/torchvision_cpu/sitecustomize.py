"""Lets a torchvision built for CUDA be imported beside a torch without it. For tests: on PYTHONPATH, or imported.

Such a torchvision cannot load its library of operators, and then fails to import because it registers further
kernels for two of them. Where that is so, and only then, the two are declared before torchvision is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class TorchvisionFinder:
    """Looks on at imports, and prepares that of torchvision."""

    #: Keeps the declarations alive: they end with their object.
    library: object = None

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Never finds anything: importing goes on as usual."""
        if name == "torchvision" and cls.library is None:
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None:
                cls._declare_operators(Path(spec.origin).parent / "_C.so")
        return None

    @classmethod
    def _declare_operators(cls, library: Path) -> None:
        import torch

        try:
            torch.ops.load_library(library)
        except OSError:
            cls.library = torch.library.Library("torchvision", "DEF")
            boxes = "Tensor dets, Tensor scores, float iou_threshold"
            cls.library.define(f"nms({boxes}) -> Tensor")
            cls.library.define(f"qnms({boxes}) -> Tensor")


if importlib.util.find_spec("torch") is not None:
    sys.meta_path.insert(0, TorchvisionFinder)
