"""The streamer of transformers models: rows side by side, until the last one has ended."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch

from wsgi_ts.handlers.hf_batch_streamer import TextIteratorStreamerBatch

WORDS = ["", "the ", "cat ", "dog ", "sat\n"]


class Tokenizer:
    """Ids are places in a list of words."""

    def decode(self, ids: Any, **arguments: Any) -> str:
        return "".join(WORDS[int(number)] for number in ids)


def test_every_row_gets_its_own_text() -> None:
    streamer = TextIteratorStreamerBatch(Tokenizer(), 2, skip_prompt=True, timeout=5)
    streamer.put(torch.tensor([[1, 1], [1, 1]]))
    for step in ([1, 1], [2, 3], [4, 0]):
        streamer.put(torch.tensor(step))
    streamer.end()
    steps = list(streamer)
    assert all(len(step) == 2 for step in steps)
    assert ["".join(step[row] for step in steps) for row in (0, 1)] == ["the cat sat\n", "the dog "]
    assert list(streamer) == []


def test_the_batch_must_have_its_size() -> None:
    streamer = TextIteratorStreamerBatch(Tokenizer(), 2)
    with pytest.raises(ValueError, match=r"for 2 rows, but got ids of shape \(3,\)"):
        streamer.put(torch.tensor([1, 2, 3]))


def test_waiting_has_an_end() -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamerBatch(Tokenizer(), 1, timeout=0.01))
