"""What the generation measurement generates with: a small GPT with random weights, and steps of a fixed cost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention


class FixedCost:
    """A simulation: each step sleeps, as a host does while its accelerator works.

    A step takes 4 ms and 0.1 ms more for each row.
    """

    def __init__(self, rows: int) -> None:
        self._lengths = [0] * rows

    def begin(self, row: int) -> None:
        """A new sequence in a row of the cache."""
        self._lengths[row] = 0

    def step(self, rows: Sequence[int]) -> list[int]:
        """The next token of each of these rows."""
        time.sleep(0.004 + 0.0001 * len(rows))
        for row in rows:
            self._lengths[row] += 1
        return [self._lengths[row] for row in rows]


class SmallGPT:
    """A decoder of GPT's shape with a cache of keys and values: 4 layers of width 256, 3.7 million weights, untrained.

    A sequence begins with one given token; the likeliest one follows.

    Args:
        rows: sequences that the cache has room for.
        longest: tokens that a sequence may have.
    """

    LAYERS, HEADS, WIDTH, VOCABULARY = 4, 4, 256, 2048

    def __init__(self, rows: int, longest: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> torch.Tensor:
            values: torch.Tensor = torch.randn(*shape, generator=generator) / shape[0] ** 0.5
            return values

        width = self.WIDTH
        self._tokens, self._positions = weights(self.VOCABULARY, width), weights(longest + 1, width)
        self._layers = [
            (weights(width, 3 * width), weights(width, width), weights(width, 4 * width), weights(4 * width, width))
            for _ in range(self.LAYERS)
        ]
        self._head = weights(width, self.VOCABULARY)
        cache = (self.LAYERS, rows, self.HEADS, longest + 1, width // self.HEADS)
        self._keys, self._values = torch.zeros(cache), torch.zeros(cache)
        self._last = torch.zeros(rows, dtype=torch.long)
        self._lengths = torch.zeros(rows, dtype=torch.long)

    def begin(self, row: int) -> None:
        """A new sequence in a row of the cache."""
        self._last[row] = row
        self._lengths[row] = 0

    def step(self, rows: Sequence[int]) -> list[int]:
        """The next token of each of these rows."""
        with torch.inference_mode():
            places = torch.tensor(rows)
            positions = self._lengths[places]
            longest = int(positions.max()) + 1
            seen = torch.arange(longest) <= positions[:, None]
            hidden = self._tokens[self._last[places]] + self._positions[positions]
            for number, (query_key_value, out, up, down) in enumerate(self._layers):
                mixed = self._attend(number, self._norm(hidden) @ query_key_value, places, positions, seen)
                hidden = hidden + mixed @ out
                hidden = hidden + gelu(self._norm(hidden) @ up) @ down
            tokens = (self._norm(hidden) @ self._head).argmax(dim=1)
            self._last[places] = tokens
            self._lengths[places] += 1
            return [int(token) for token in tokens.tolist()]

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return layer_norm(hidden, (self.WIDTH,))

    def _attend(
        self, layer: int, projected: torch.Tensor, places: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Attention of each row's newest token to all of its sequence."""
        count, longest = seen.shape
        query, key, value = projected.view(count, 3, self.HEADS, -1).unbind(1)
        self._keys[layer, places, :, positions] = key
        self._values[layer, places, :, positions] = value
        keys, values = self._keys[layer, places, :, :longest], self._values[layer, places, :, :longest]
        mixed = scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=seen[:, None, None])
        return mixed.reshape(count, -1)
