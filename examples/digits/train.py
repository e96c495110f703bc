"""Trains the digits example: 1437 handwritten digits of scikit-learn, a few seconds on a CPU.

Writes the weights (digits.pt) and one image that the network has never seen for each digit (images/0.png ... 9.png).

    python examples/digits/train.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from model import DigitNet
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

EPOCHS = 20
BATCH = 32
#: Images are enlarged by this much, so that a person can see what is on them.
ENLARGED = 16


def train(images: torch.Tensor, digits: torch.Tensor, test_images: torch.Tensor, test_digits: torch.Tensor) -> DigitNet:
    """Trains a network and prints how it gets on."""
    torch.manual_seed(0)
    network = DigitNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(1, EPOCHS + 1):
        network.train()
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(network(images[chosen]), digits[chosen])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        network.eval()
        with torch.inference_mode():
            right = (network(test_images).argmax(dim=1) == test_digits).float().mean().item()
        loss_shown = f"loss {total / len(images):.4f}"
        print(f"  epoch {epoch:2}/{EPOCHS}  {loss_shown}  right on unseen digits {right:.1%}", flush=True)
    return network


def save_samples(images: torch.Tensor, digits: torch.Tensor, folder: Path) -> None:
    """Writes the first image of each digit as a PNG file."""
    folder.mkdir(parents=True, exist_ok=True)
    for digit in range(10):
        first = int((digits == digit).nonzero()[0])
        pixels = (images[first, 0].numpy() * 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((8 * ENLARGED, 8 * ENLARGED), Image.Resampling.NEAREST)
        image.save(folder / f"{digit}.png")


def main() -> None:
    """Trains, then writes weights and images into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/digits/train.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    pixels = (data.images / 16.0).astype(np.float32)[:, np.newaxis]
    split = train_test_split(pixels, data.target, test_size=0.2, random_state=0, stratify=data.target)
    images, test_images, digits, test_digits = (torch.from_numpy(part) for part in split)
    print(f"  {len(images)} digits to learn from, {len(test_images)} to check with", flush=True)
    network = train(images, digits, test_images, test_digits)
    save_samples(test_images, test_digits, output / "images")
    # Last, because its presence says that the whole was done.
    torch.save(network.state_dict(), output / "digits.pt")


if __name__ == "__main__":
    main()
