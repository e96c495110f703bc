"""Trains the MNIST example on digits that it draws itself: a few seconds on a CPU, the same result each time.

Writes the weights (mnist_cnn.pt) and one image that the network has not learnt from for each digit
(mnist_images/0.png ... 9.png).

    python examples/mnist/train.py OUTPUT_FOLDER
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import torch
from mnist import Net
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn

PIXELS = 28
PER_DIGIT = 400
EPOCHS = 5
BATCH = 50
#: Mean and deviation that the handler normalises with: those of the MNIST images.
MEAN, DEVIATION = 0.1307, 0.3081


def draw(digit: int, chance: random.Random) -> Image.Image:
    """A digit in light strokes on a dark ground, a little turned, moved, thickened and blurred by `chance`."""
    image = Image.new("L", (PIXELS, PIXELS))
    centre = (PIXELS / 2 + chance.uniform(-2, 2), PIXELS / 2 + chance.uniform(-2, 2))
    ImageDraw.Draw(image).text(
        centre,
        str(digit),
        fill=255,
        font=ImageFont.load_default(size=chance.uniform(18, 26)),
        anchor="mm",
        stroke_width=chance.randint(0, 1),
    )
    turned = image.rotate(chance.uniform(-15, 15), Image.Resampling.BILINEAR)
    return turned.filter(ImageFilter.GaussianBlur(chance.uniform(0, 0.7)))


def as_input(image: Image.Image) -> torch.Tensor:
    """The image as the handler gives it to the network: (1, 28, 28), normalised."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
    return ((pixels - MEAN) / DEVIATION).unsqueeze(0)


def train(images: torch.Tensor, digits: torch.Tensor) -> Net:
    """Trains a network and prints how it gets on."""
    # So small a network is not worth the cost of keeping threads in step, least of all on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Net()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(network(images[chosen]), digits[chosen])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        print(f"  epoch {epoch}/{EPOCHS}  loss {total / len(images):.4f}", flush=True)
    return network.eval()


def main() -> None:
    """Trains, then writes images and weights into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/mnist/train.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    pictures = output / "mnist_images"
    pictures.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    digits = torch.arange(10).repeat(PER_DIGIT)
    network = train(torch.stack([as_input(draw(int(digit), chance)) for digit in digits]), digits)
    unseen = [draw(digit, chance) for digit in range(10)]
    with torch.inference_mode():
        answers = network(torch.stack([as_input(image) for image in unseen])).argmax(dim=1).tolist()
    print(f"  unseen digits 0 ... 9 read as {answers}", flush=True)
    for digit, image in enumerate(unseen):
        image.save(pictures / f"{digit}.png")
    # Last, because its presence says that the whole was done.
    torch.save(network.state_dict(), output / "mnist_cnn.pt")


if __name__ == "__main__":
    main()
