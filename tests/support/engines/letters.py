"""A language model of 26 letters: after each comes the next one of the alphabet, by a matrix product."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LetterModel(torch.nn.Module):
    """Scores for the letter that follows another."""

    def __init__(self) -> None:
        super().__init__()
        self.after = torch.nn.Parameter(torch.eye(len(LETTERS)).roll(1, dims=1))

    def forward(self, letter: torch.Tensor) -> torch.Tensor:
        """One row of scores per letter."""
        return torch.nn.functional.one_hot(letter, len(LETTERS)).float() @ self.after


async def continue_text(model: LetterModel, prompt: str, max_tokens: int) -> AsyncIterator[str]:
    """The letters that follow a prompt, one by one, with a turn of the event loop before each.

    After anything else comes "a".
    """
    letter = torch.tensor([LETTERS.find(prompt[-1]) % len(LETTERS)])
    for _ in range(max_tokens):
        await asyncio.sleep(0)
        with torch.inference_mode():
            letter = model(letter).argmax(dim=1)
        yield LETTERS[int(letter)]
