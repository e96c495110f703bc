"""Segments: the shared memory that carries requests and answers between a web worker, the batchers and model workers.

`Segment` is the mapped object with its views; who may write what, and when, is in `README.md` beside this file.
"""

from __future__ import annotations

import os

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import RequestFlag, ResponseFlag, SegmentLayout, SegmentWord
from wsgi_ts.batcher.shm.shared_memory import SharedMemory


def segment_name(prefix: str, index: int) -> str:
    """Name of a segment and of its doorbell."""
    return f"{prefix}-s{index}"


class Segment:
    """A mapped segment.

    Attributes:
        layout: where everything is.
        buffer: all bytes.
        header: words of page 0.
        states: one word per slot, generation << 8 | state.
        cancels: one word per slot.
        first_slot: offset of slot 0 in `buffer`.
        slot_words: the slots' own words.
    """

    def __init__(self, memory: SharedMemory, segment_layout: SegmentLayout, index: int) -> None:
        self.memory = memory
        self.index = index
        self.layout = segment_layout
        self.buffer = memory.buffer
        self.header = memory.words(0, layout.PAGE // layout.WORD)
        self.states = memory.words(segment_layout.states, segment_layout.slots)
        self.cancels = memory.words(segment_layout.cancels, segment_layout.slots)
        first = self.first_slot = segment_layout.first_slot
        self._response_start = first + layout.RESPONSE_HEADER
        self.slot_words = memory.words(first, segment_layout.slots * layout.SLOT_BYTES // layout.WORD)

    @classmethod
    def create(cls, prefix: str, index: int, segment_layout: SegmentLayout) -> Segment:
        """Makes a segment (control pages and inline areas reserved) and its doorbell.

        Raises:
            SharedMemoryFull: no room; the text says how much is needed.
        """
        name = segment_name(prefix, index)
        reserved = segment_layout.reserved_bytes
        memory = SharedMemory(name, segment_layout.total_bytes, reserve=reserved, create=True)
        Doorbell.create(name)
        segment = cls(memory, segment_layout, index)
        header = segment.header
        header[SegmentWord.VERSION] = layout.LAYOUT_VERSION
        header[SegmentWord.OWNER_PID] = os.getpid()
        header[SegmentWord.SLOTS] = segment_layout.slots
        header[SegmentWord.RINGS] = segment_layout.rings
        header[SegmentWord.REQUEST_RANGE] = segment_layout.max_request_bytes
        header[SegmentWord.RESPONSE_RANGE] = segment_layout.max_response_bytes
        header[SegmentWord.MAGIC] = layout.MAGIC
        return segment

    @classmethod
    def attach(cls, prefix: str, index: int) -> Segment:
        """Maps another process's segment.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it is not a segment of this layout, or its numbers are damaged.
        """
        memory = SharedMemory(segment_name(prefix, index))
        header = memory.words(0, layout.PAGE // layout.WORD)
        if header[SegmentWord.MAGIC] != layout.MAGIC or header[SegmentWord.VERSION] != layout.LAYOUT_VERSION:
            memory.close()
            raise ValueError(f"segment {index} does not have this server's layout")
        segment_layout = SegmentLayout(
            header[SegmentWord.SLOTS],
            header[SegmentWord.RINGS],
            header[SegmentWord.REQUEST_RANGE],
            header[SegmentWord.RESPONSE_RANGE],
        )
        if segment_layout.total_bytes != memory.size:
            memory.close()
            raise ValueError(f"segment {index} is damaged: its size does not follow from its header")
        return cls(memory, segment_layout, index)

    def bell(self, prefix: str) -> Doorbell:
        """The doorbell of the segment's owner."""
        return Doorbell(segment_name(prefix, self.index), self.header, SegmentWord.ASLEEP)

    def generation(self, slot: int) -> int:
        """The low 32 bits of the generation that the slot's state word names."""
        return self.states[slot] >> layout.GENERATION_SHIFT & layout.RING_GENERATION_MASK

    def arrival_ns(self, slot: int) -> int:
        """When the slot's request arrived: the first word of its header."""
        return self.slot_words[slot * layout.SLOT_WORDS]

    def ids(self, slot: int) -> tuple[str, str]:
        """The ids of the slot's sequence ("" where its model has none) and of its request."""
        fields = layout.REQUEST.unpack_from(self.buffer, self.layout.slot(slot))
        start = self.layout.slot(slot) + layout.REQUEST_INLINE
        if fields[3] & RequestFlag.HEAD_OUTSIDE:
            start = self.layout.request_payload(slot)
        start += sum(fields[4:7])  # head, url_path, content type
        return str(self.buffer[start : start + fields[9]], "latin-1"), str(fields[8], "ascii")

    def head(self, slot: int) -> tuple[bytes, int]:
        """The head of the slot's request, and the length of its body."""
        fields = layout.REQUEST.unpack_from(self.buffer, self.layout.slot(slot))
        start = self.layout.slot(slot) + layout.REQUEST_INLINE
        if fields[3] & RequestFlag.HEAD_OUTSIDE:
            start = self.layout.request_payload(slot)
        return bytes(self.buffer[start : start + fields[4]]), fields[1]

    def write_response(self, slot: int, header: bytes, meta: bytes, body: bytes | bytearray | memoryview) -> None:
        """Writes a response header and the inline data behind it with one copy; the state word is the caller's."""
        data = b"".join((header, meta, body))
        start = self._response_start + slot * layout.SLOT_BYTES
        self.buffer[start : start + len(data)] = data

    def fail(self, slot: int, status: int, message: str, batch: bytes = layout.NO_BATCH) -> None:
        """Writes an error answer into a slot and marks it FAILED (for the batcher, on behalf of the slot's writer).

        Without a message it is a refusal.
        """
        text = message.encode()[: layout.RESPONSE_INLINE_BYTES]
        flags = 0 if text else ResponseFlag.REFUSED
        header = layout.RESPONSE.pack(0, 0, len(text), status, flags, 0, 0, self.generation(slot))
        self.write_response(slot, header, batch, text)
        self.states[slot] = self.states[slot] & ~0xFF | layout.SlotState.FAILED

    def settle(self, slot: int) -> None:
        """Marks a slot FAILED whose worker has written the error into it (for the batcher: see README, rule 3)."""
        self.states[slot] = self.states[slot] & ~0xFF | layout.SlotState.FAILED

    def claim_again(self, slot: int) -> None:
        """Marks a slot for another execution, after one that failed (for the batcher: see README, rule 3)."""
        self.states[slot] = self.states[slot] & ~0xFF | layout.SlotState.AGAIN

    def fail_cancelled(self, slot: int) -> None:
        """Ends a request whose client has gone and that no handler has seen; the web worker sends nothing."""
        self.fail(slot, 499, layout.CLIENT_GONE)

    def fail_late(self, slot: int) -> None:
        """Ends a request that no handler has seen and whose own deadline has passed."""
        self.fail(slot, 408, layout.TOO_LATE)

    def close(self) -> None:
        """Closes the descriptor; the memory goes when the views do."""
        self.memory.close()
