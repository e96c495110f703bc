"""The submission ring: slot numbers from one producer (a web worker) to one consumer (a batcher).

The tail, which the producer writes, is the only position in shared memory. A consumer begins where the tail stands when
it attaches, and finds what was submitted before by a scan of the slots' states (`AttachedSegment.scan`): so nothing
depends on how far a consumer that was killed had come. An entry names slot, model and generation; the consumer still
looks at the slot's state word, so an entry that the scan has been quicker than is skipped, never obeyed.

The ring has twice as many entries as the segment has slots, so that it is never overrun. From a consumer's first look
on, a slot has one unread entry at most: it is pushed again only after the consumer has read the last one. Before it, a
slot may have two: one that was pushed and not published when the scan found the slot, and the next request's.
"""

from __future__ import annotations

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.segment import Segment


class RingDamaged(Exception):
    """The tail is where no producer can have put it: something has written over shared memory."""


class _Ring:
    def __init__(self, segment: Segment, batcher: int) -> None:
        start = segment.layout.ring(batcher)
        entries = segment.layout.ring_entries
        self._tail_word = segment.memory.words(start, 1)
        self._entries = segment.memory.words(start + layout.LINE_WORDS * layout.WORD, 2 * entries)
        self._mask = entries - 1


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
            slot
            | model << layout.RING_MODEL_SHIFT
            | (generation & layout.RING_GENERATION_MASK) << layout.RING_GENERATION_SHIFT
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
    """The batcher's side. It begins behind what is there: look at the slots' states after making one."""

    def __init__(self, segment: Segment, batcher: int) -> None:
        super().__init__(segment, batcher)
        self._head = self._tail_word[0]

    @property
    def waiting(self) -> int:
        """Entries not yet popped; any other number than 0 is a reason to call `pop_all`."""
        return self._tail_word[0] - self._head

    def pop_all(self) -> list[int]:
        """All new entries as a flat list: word 0 and word 1 of each.

        Raises:
            RingDamaged: there cannot be so many; `skip_all`, and look at the slots' states.
        """
        count = self.waiting
        if not 0 <= count <= self._mask + 1:
            raise RingDamaged(f"{count} entries in a ring of {self._mask + 1}")
        first = self._head & self._mask
        room = self._mask + 1 - first
        self._head += count
        if count <= room:
            return self._entries[2 * first : 2 * (first + count)].tolist()
        return self._entries[2 * first :].tolist() + self._entries[: 2 * (count - room)].tolist()

    def skip_all(self) -> None:
        """Begins anew behind what is there."""
        self._head = self._tail_word[0]
