"""Draws cats and dogs, and trains two small networks on them: cat or dog, and which breed a dog is.

Writes animal.pt and breed.pt, and a picture of each kind that the networks have not seen (cat.png, dalmatian.png ...).
Takes about five seconds on a CPU.

    python examples/workflows/breed/make_models.py OUTPUT_FOLDER
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from model import PIXELS, PictureNet
from PIL import Image, ImageDraw
from torch import nn

BREEDS = ("dalmatian", "setter", "poodle")
KINDS = ("cat", *BREEDS)
EACH = 100
EPOCHS = 8


def draw(kind: str, chance: random.Random) -> Image.Image:
    """A head: a cat's ears point up, a dog's hang down; breeds differ by their coats."""
    background = tuple(chance.randint(150, 255) for _ in range(3))
    picture = Image.new("RGB", (PIXELS, PIXELS), background)
    pen = ImageDraw.Draw(picture)
    x, y, r = chance.randint(13, 19), chance.randint(15, 19), chance.randint(7, 9)
    coats = {"cat": (200, 120, 40), "dalmatian": (245, 245, 245), "setter": (150, 60, 20), "poodle": (90, 90, 100)}
    coat = tuple(max(0, min(255, part + chance.randint(-25, 25))) for part in coats[kind])
    if kind == "cat":
        coat = tuple(max(0, min(255, part + chance.randint(-90, 60))) for part in coat)
        pen.polygon([(x - r, y), (x - r, y - r - 5), (x, y - r + 2)], fill=coat)
        pen.polygon([(x + r, y), (x + r, y - r - 5), (x, y - r + 2)], fill=coat)
    else:
        pen.ellipse([x - r - 5, y - 4, x - r + 2, y + r + 2], fill=coat, outline=(40, 30, 30))
        pen.ellipse([x + r - 2, y - 4, x + r + 5, y + r + 2], fill=coat, outline=(40, 30, 30))
    pen.ellipse([x - r, y - r, x + r, y + r], fill=coat)
    if kind == "dalmatian":
        for _ in range(7):
            spot_x, spot_y = x + chance.randint(-r + 2, r - 2), y + chance.randint(-r + 2, r - 2)
            pen.ellipse([spot_x - 1, spot_y - 1, spot_x + 1, spot_y + 1], fill=(20, 20, 20))
    if kind == "poodle":
        for step in range(-r, r + 1, 3):
            pen.ellipse([x + step - 2, y - r - 3, x + step + 2, y - r + 2], fill=coat, outline=(50, 50, 60))
    for side in (-3, 3):
        pen.ellipse([x + side - 1, y - 2, x + side, y - 1], fill=(10, 10, 10))
    pen.rectangle([x - 1, y + 3, x, y + 4], fill=(60, 20, 20))
    return picture


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """The pictures as the networks take them."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def train(pictures: torch.Tensor, answers: torch.Tensor, classes: int) -> PictureNet:
    """A network that has learnt to tell the classes apart."""
    torch.manual_seed(0)
    network = PictureNet(classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pictures)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(pictures[rows]), answers[rows]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    """Writes weights and pictures into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/workflows/breed/make_models.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    chance = random.Random(0)
    pictures = as_tensor([draw(kind, chance) for kind in KINDS for _ in range(EACH)])
    kinds = torch.arange(len(KINDS)).repeat_interleave(EACH)
    # As many cats as dogs: each cat counts three times.
    more = torch.cat([torch.arange(len(kinds)), *[torch.arange(EACH)] * 2])
    animals = train(pictures[more], (kinds > 0).long()[more], 2)
    breeds = train(pictures[kinds > 0], kinds[kinds > 0] - 1, len(BREEDS))
    torch.save(animals.state_dict(), output / "animal.pt")
    torch.save(breeds.state_dict(), output / "breed.pt")
    for number, kind in enumerate(KINDS):
        unseen = [draw(kind, chance) for _ in range(50)]
        with torch.inference_mode():
            right = (animals(as_tensor(unseen)).argmax(1) == int(number > 0)).float().mean()
        print(f"{kind}: {right:.0%} of 50 pictures are told to be a {'dog' if number else 'cat'}")
        unseen[0].save(output / f"{kind}.png")


if __name__ == "__main__":
    main()
