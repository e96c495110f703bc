"""The ring in which the chunks of a streamed answer travel, from a model worker to the slot's owner.

It is the beginning of the slot's response range. Two words at the end of the slot say how many bytes were ever put in
(tail, written by the model worker) and taken out (head, written by the slot's owner). Each chunk has its length before
it, in four bytes; a chunk larger than half the ring is put in as several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.segment import Segment

_TAIL: Final = layout.STREAM_WORDS // layout.WORD
_HEAD: Final = _TAIL + 1
_LENGTH_BYTES: Final = 4
_PIECE_BYTES: Final = layout.STREAM_RING_BYTES // 2


def open_ring(segment: Segment, slot: int) -> None:
    """Makes a slot's ring an empty one.

    Raises:
        SharedMemoryFull: /dev/shm has no room for it.
    """
    segment.memory.reserve(segment.layout.response_payload(slot), layout.STREAM_RING_BYTES)
    words, first = segment.slot_words, slot * layout.SLOT_WORDS
    words[first + _TAIL] = words[first + _HEAD] = 0


def pieces_of(chunk: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """Cuts a chunk into pieces that fit into a ring; an empty one is one empty piece."""
    for offset in range(0, max(len(chunk), 1), _PIECE_BYTES):
        yield bytes(chunk[offset : offset + _PIECE_BYTES])


def try_push(segment: Segment, slot: int, piece: bytes) -> bool:
    """Puts one of `pieces_of` a chunk into the ring; returns False while there is no room for it."""
    words, first = segment.slot_words, slot * layout.SLOT_WORDS
    tail = words[first + _TAIL]
    end = tail + _LENGTH_BYTES + len(piece)
    if end - words[first + _HEAD] > layout.STREAM_RING_BYTES:
        return False
    ring = _ring(segment, slot)
    data = len(piece).to_bytes(_LENGTH_BYTES, "little") + piece
    start = tail % len(ring)
    room = len(ring) - start
    ring[start : start + len(data)] = data[:room]
    ring[: max(0, len(data) - room)] = data[room:]
    words[first + _TAIL] = end
    return True


def has_chunks(segment: Segment, slot: int) -> bool:
    """Returns whether there is something to take."""
    words, first = segment.slot_words, slot * layout.SLOT_WORDS
    return bool(words[first + _TAIL] != words[first + _HEAD])


def take_chunks(segment: Segment, slot: int) -> list[bytes]:
    """Takes all that lies in the ring and makes room for more.

    Positions that a handler's stray write has damaged end in no chunks, or short ones, never in a loop without end.
    """
    words, first = segment.slot_words, slot * layout.SLOT_WORDS
    tail, head = words[first + _TAIL], words[first + _HEAD]
    ring = _ring(segment, slot)
    chunks: list[bytes] = []
    if tail - head > layout.STREAM_RING_BYTES or tail < head:
        head = tail
    while head < tail:
        length = int.from_bytes(_read(ring, head, _LENGTH_BYTES), "little")
        end = head + _LENGTH_BYTES + length
        if end > tail:
            head = tail
            break
        chunks.append(_read(ring, head + _LENGTH_BYTES, length))
        head = end
    words[first + _HEAD] = head
    return chunks


def _ring(segment: Segment, slot: int) -> memoryview:
    start = segment.layout.response_payload(slot)
    return segment.buffer[start : start + layout.STREAM_RING_BYTES]


def _read(ring: memoryview, position: int, length: int) -> bytes:
    start = position % len(ring)
    room = len(ring) - start
    if length <= room:
        return bytes(ring[start : start + length])
    return bytes(ring[start:]) + bytes(ring[: length - room])
