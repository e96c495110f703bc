"""Trains a small network that tells four kinds of waves apart, and cuts it into four models.

Writes model1.pt to model4.pt, and one wave of each kind that the network has not seen (sine.json ... sawtooth.json).
Takes about two seconds on a CPU.

    python examples/workflows/four_models/make_models.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

NAMES = ("sine", "square", "triangle", "sawtooth")
POINTS = 64
EPOCHS = 200


class Spectrum(nn.Module):
    """How strong each frequency is in a wave: (waves, 64) -> (waves, 33)."""

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(waves).abs() / 32


def waves_of(kind: int, count: int) -> torch.Tensor:
    """Waves of one kind, of any phase and frequency, with some noise."""
    turns = torch.rand(count, 1) + torch.randint(2, 6, (count, 1)) * torch.arange(POINTS) / POINTS
    turns = turns % 1
    shapes = (
        torch.sin(2 * torch.pi * turns),
        torch.where(turns < 0.5, 1.0, -1.0),
        1 - 4 * (turns - 0.5).abs(),
        2 * turns - 1,
    )
    return shapes[kind] + 0.05 * torch.randn(count, POINTS)


def train() -> list[nn.Module]:
    """The four parts of a network that has learnt."""
    torch.manual_seed(0)
    parts = [
        Spectrum(),
        nn.Sequential(nn.Linear(33, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 16), nn.ReLU()),
        nn.Linear(16, len(NAMES)),
    ]
    network = nn.Sequential(*parts)
    waves = torch.cat([waves_of(kind, 300) for kind in range(len(NAMES))])
    kinds = torch.arange(len(NAMES)).repeat_interleave(300)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(waves), kinds).backward()
        optimizer.step()
    unseen = torch.cat([waves_of(kind, 100) for kind in range(len(NAMES))])
    right = (network(unseen).argmax(1) == torch.arange(len(NAMES)).repeat_interleave(100)).float().mean()
    print(f"right for {right:.1%} of 400 waves that it has not seen")
    parts[-1] = nn.Sequential(parts[-1], nn.Softmax(dim=1))
    return parts


def main() -> None:
    """Writes the models and the waves into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/workflows/four_models/make_models.py OUTPUT_FOLDER")
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(train(), start=1):
        torch.jit.script(part.eval()).save(output / f"model{number}.pt")
    for kind, name in enumerate(NAMES):
        [wave] = waves_of(kind, 1).tolist()
        (output / f"{name}.json").write_text(json.dumps([round(value, 4) for value in wave]) + "\n")


if __name__ == "__main__":
    main()
