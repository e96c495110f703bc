"""The network of the MNIST example: archived with --model-file, so it defines exactly one class."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions and one linear layer, from 28x28 grey images to ten scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (n, 10) of normalised images (n, 1, 28, 28)."""
        scores: torch.Tensor = self.layers(images)
        return scores
