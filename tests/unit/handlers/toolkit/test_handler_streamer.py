"""The streamer of transformers models: rows side by side, until the last one has ended."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from wsgi_ts.handlers.toolkit.hf_batch_streamer import TextIteratorStreamerBatch

WORDS = ["<pad>", "the", "cat", "dog", "sat"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer of transformers whose ids are places in a list of words."""
    # Not with the module: every process of the tests imports that.
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>")


def test_every_row_gets_its_own_text(tokenizer: Any) -> None:
    streamer = TextIteratorStreamerBatch(tokenizer, 2, skip_prompt=True, timeout=60, skip_special_tokens=True)
    for _ in range(2):  # it serves one generation after the other
        streamer.put(torch.tensor([[1, 1], [1, 1]]))
        for step in ([1, 1], [2, 3], [4, 0]):
            streamer.put(torch.tensor(step))
        streamer.end()
        steps = list(streamer)
        assert all(len(step) == 2 for step in steps)
        assert ["".join(step[row]["text"] for step in steps) for row in (0, 1)] == ["the cat sat", "the dog"]


def test_the_batch_must_have_its_size(tokenizer: Any) -> None:
    streamer = TextIteratorStreamerBatch(tokenizer, 2)
    with pytest.raises(ValueError, match=r"for 2 rows, but got ids of shape \(3,\)"):
        streamer.put(torch.tensor([1, 2, 3]))


def test_waiting_has_an_end(tokenizer: Any) -> None:
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamerBatch(tokenizer, 1, timeout=0.01))
