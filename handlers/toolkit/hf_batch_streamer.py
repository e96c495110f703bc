"""Text that a transformers model generates for a whole batch, handed over row by row while it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.generation.streamers import BaseStreamer, TextIteratorStreamer


class TextIteratorStreamerBatch(BaseStreamer):
    """One streamer per row of a batch: `model.generate(**inputs, streamer=streamer)` in a thread, iterated in another.

    Each step of the iteration gives a list with the next piece of every row, as {"text": piece}; "" for a row without
    one. After the last step the streamer may be given to the next generation.

    Args:
        skip_prompt: leave out the prompt that generation begins with.
        timeout: how long a step may take, in seconds; None for ever. `queue.Empty` is raised beyond it.
        decode_kwargs: further arguments of the tokenizer's `decode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        batch_size: int,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        self.batch_size = batch_size
        self.streamers: list[Any] = [
            TextIteratorStreamer(tokenizer, skip_prompt, timeout, **decode_kwargs) for _ in range(batch_size)
        ]
        self._unfinished = set(range(batch_size))

    def put(self, value: Any) -> None:
        """Takes the next ids of all rows, an int64 tensor (B,), or (B, ids) for the prompts.

        Raises:
            ValueError: not as many rows as the batch has.
        """
        if len(value) != self.batch_size:
            raise ValueError(f"the streamer is for {self.batch_size} rows, but got ids of shape {tuple(value.shape)}")
        for row, streamer in enumerate(self.streamers):
            streamer.put(value[row : row + 1])

    def end(self) -> None:
        """Takes note that generation has ended."""
        for streamer in self.streamers:
            streamer.end()

    def __iter__(self) -> Iterator[list[dict[str, str]]]:
        return self

    def __next__(self) -> list[dict[str, str]]:
        texts = [self._next_of(row) for row in range(self.batch_size)]
        if not self._unfinished and not any(texts):
            self._unfinished = set(range(self.batch_size))
            raise StopIteration
        return [{"text": text} for text in texts]

    def _next_of(self, row: int) -> str:
        if row not in self._unfinished:
            return ""
        text: str | None = next(self.streamers[row], None)
        if text is None:
            self._unfinished.discard(row)
        return text or ""
