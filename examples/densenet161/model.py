"""The network of the densenet161 example: archived with --model-file, so it defines exactly one class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchvision.models import DenseNet

#: In torchvision's published weights a layer is called norm.1; its module has been norm1 since.
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)")


class ImageClassifier(DenseNet):
    """DenseNet-161, which takes the file densenet161-8d451a50.pth as torchvision publishes it."""

    def __init__(self) -> None:
        super().__init__(growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights under old or new names."""
        renamed = {_OLD_NAME.sub(r"\1\2", name): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)
