"""The submission ring: slot numbers from one producer (a web worker) to one consumer (a batcher).

Each side owns one word: the producer the tail, the consumer the head. The ring has as many entries as the segment has
slots, so it can never be full. An entry names slot, model and generation; the consumer still looks at the slot's state
word, so a stale entry is skipped, never obeyed.
"""

from __future__ import annotations

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.segment import Segment


class _Ring:
    def __init__(self, segment: Segment, batcher: int) -> None:
        start = segment.layout.ring(batcher)
        slots = segment.layout.slots
        lines = layout.LINE_WORDS
        self._tail_word = segment.memory.words(start, 1)
        self._head_word = segment.memory.words(start + lines * layout.WORD, 1)
        self._entries = segment.memory.words(start + 2 * lines * layout.WORD, 2 * slots)
        self._mask = slots - 1


class RingProducer(_Ring):
    """The web worker's side. `push` any number of entries, then `publish` once."""

    def __init__(self, segment: Segment, batcher: int) -> None:
        super().__init__(segment, batcher)
        self._tail = self._tail_word[0]
        self._published = self._tail

    def push(self, slot: int, model: int, generation: int, idle_us: int) -> None:
        """Adds an entry that the consumer does not see yet."""
        place = (self._tail & self._mask) * 2
        self._entries[place] = (
            slot | model << layout.RING_MODEL_SHIFT | (generation & 0xFFFFFFFF) << layout.RING_GENERATION_SHIFT
        )
        self._entries[place + 1] = idle_us
        self._tail += 1

    @property
    def unpublished(self) -> int:
        """How many entries were pushed since the last `publish`."""
        return self._tail - self._published

    def publish(self) -> bool:
        """Shows the consumer all that was pushed; True when there was anything new."""
        if self._tail == self._published:
            return False
        self._tail_word[0] = self._published = self._tail
        return True


class RingConsumer(_Ring):
    """The batcher's side; its head is kept in shared memory, so a new batcher goes on where the old one stopped."""

    def __init__(self, segment: Segment, batcher: int) -> None:
        super().__init__(segment, batcher)
        self._head = self._head_word[0]

    @property
    def waiting(self) -> int:
        """Entries not yet popped (0 for a damaged tail)."""
        count: int = self._tail_word[0] - self._head
        return count if 0 <= count <= self._mask + 1 else 0

    def pop_all(self) -> list[int]:
        """All new entries as a flat list of word 0, word 1, word 0, …; they count as taken when `commit` is called."""
        count = self.waiting
        if count == 0:
            return []
        first = self._head & self._mask
        room = self._mask + 1 - first
        self._head += count
        if count <= room:
            return self._entries[2 * first : 2 * (first + count)].tolist()
        return self._entries[2 * first :].tolist() + self._entries[: 2 * (count - room)].tolist()

    def commit(self) -> None:
        """Writes the head: what was popped is now the consumer's."""
        self._head_word[0] = self._head
