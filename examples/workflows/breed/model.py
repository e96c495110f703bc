"""A small convolutional network for pictures of 32 x 32 points."""

import torch
from torch import nn

PIXELS = 32


class PictureNet(nn.Module):
    """Pictures of shape (batch, 3, 32, 32) to one number for each class."""

    def __init__(self, classes: int = 0, **_: object) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
            *[nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
        )
        self.head = nn.Linear(16 * 4 * 4, classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pictures))
