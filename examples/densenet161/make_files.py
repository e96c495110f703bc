"""Makes what the densenet161 example needs besides its model file, where nothing can be downloaded.

Writes labels (index_to_name.json), a picture (kitten_small.jpg) and weights of the right form but random values
(densenet161-8d451a50.pth, 110 MB). With the real weights of
https://download.pytorch.org/models/densenet161-8d451a50.pth in the folder, those are left as they are.

    python examples/densenet161/make_files.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from model import ImageClassifier
from PIL import Image, ImageDraw
from torchvision.models import DenseNet161_Weights

WEIGHTS = "densenet161-8d451a50.pth"


def write_labels(path: Path) -> None:
    """The thousand classes of ImageNet in the order of the network's outputs."""
    names = DenseNet161_Weights.IMAGENET1K_V1.meta["categories"]
    labels = {str(index): name.replace(" ", "_") for index, name in enumerate(names)}
    path.write_text(json.dumps(labels, indent=2) + "\n")


def write_picture(path: Path) -> None:
    """A cat's face, as far as ellipses go."""
    image = Image.new("RGB", (320, 240), "peachpuff")
    draw = ImageDraw.Draw(image)
    draw.polygon([(90, 100), (100, 25), (150, 70)], fill="saddlebrown")
    draw.polygon([(230, 100), (220, 25), (170, 70)], fill="saddlebrown")
    draw.ellipse((80, 50, 240, 210), fill="sandybrown")
    for left in (115, 175):
        draw.ellipse((left, 100, left + 30, 130), fill="khaki", outline="black")
        draw.ellipse((left + 11, 102, left + 19, 128), fill="black")
    draw.polygon([(150, 150), (170, 150), (160, 162)], fill="pink")
    image.save(path)


def write_random_weights(path: Path) -> None:
    """A state_dict with the names that torchvision's file has: denselayer1.norm.1, and no batch counters."""
    torch.manual_seed(0)
    weights = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d\.)", r"\1.\2", name): value
        for name, value in ImageClassifier().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(weights, path)


def main() -> None:
    """Writes the three files into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/densenet161/make_files.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    write_labels(output / "index_to_name.json")
    write_picture(output / "kitten_small.jpg")
    if not (output / WEIGHTS).exists():
        write_random_weights(output / WEIGHTS)


if __name__ == "__main__":
    main()
