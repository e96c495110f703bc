"""A small text classifier: layers of a transformer encoder over bytes, and scores of four classes.

    python examples/large_models/torch_pipelining/classifier.py OUTPUT_FILE

writes one with random weights, the same each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

SIZE = 64
LAYERS = 6
CLASSES = 4
PAD = 256


class Classifier(nn.Module):
    """The classifier, or a stage of it: what a stage does not have is None, or missing in the list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(PAD + 1, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, 4, 2 * SIZE, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).layers
        self.head: nn.Module | None = nn.Linear(SIZE, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = inputs if self.embed is None else self.embed(inputs)
        for layer in self.layers:
            states = layer(states)
        return states if self.head is None else self.head(states.mean(dim=1))


def main() -> None:
    """Writes the weights to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/large_models/torch_pipelining/classifier.py OUTPUT_FILE")
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Classifier()
    for layer in model.layers:  # copies of one layer until here
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), file)


if __name__ == "__main__":
    main()
