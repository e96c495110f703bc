"""The web side of a segment: take a slot, write a request, push it, find the answer, give the slot back.

One `SlotClient` belongs to one thread (the loop of a web worker). Where requests come from several threads
(`dataplane.blocking`), its owner holds a lock around each call.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any, Final

from wsgi_ts.batcher.shm import layout, stream
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import SlotState, WebWord
from wsgi_ts.batcher.shm.request_codec import (
    DAMAGED,
    Answer,
    Request,
    answer_range,
    is_unanswered,
    read_answer,
    rewrite_header,
    write_request,
)
from wsgi_ts.batcher.shm.ring import RingProducer
from wsgi_ts.batcher.shm.segment import Segment

log = logging.getLogger(__name__)

#: How many slots a model may have for each one that is free (see `SlotClient.take`).
MOST_PER_FREE_SLOT: Final = 16
_STATE_MASK: Final = layout.STATE_MASK
_GENERATION_SHIFT: Final = layout.GENERATION_SHIFT


class SlotClient:
    """The producer of one segment.

    Args:
        warm_bytes: reserved payload memory that free slots may keep; beyond it a slot's pages go back at release.
    """

    def __init__(self, segment: Segment, board: Board, batchers: int, warm_bytes: int) -> None:
        self.segment = segment
        self._layout = segment.layout
        self._buffer = segment.buffer
        self._states = segment.states
        self._cancels = segment.cancels
        self._scan: Any = None
        self._rings = [RingProducer(segment, index) for index in range(batchers)]
        self._bells = [board.batcher_bell(index) for index in range(batchers)]
        slots = self._layout.slots
        self._generations = [0] * slots
        self._request_reserved = [0] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._highest = 0
        self._warm_limit = warm_bytes
        self._warm = 0
        self._other_held = [0] * slots
        #: Slots of which only chunks, or the end, are news: streams that are being read, and what nobody waits for.
        self._quiet: set[int] = set()
        #: Slots whose requests are other processes' business.
        self._submitted = bytearray(slots)
        #: Slots that are not used again: some model worker may still write into them.
        self._set_aside: set[int] = set()
        self._model_of = [0] * slots
        self._held = [0] * layout.MAX_MODELS
        self.in_flight = 0
        self._board_words, self._web_row = board.words, board.web_row(segment.index)
        self._board_words[self._web_row + WebWord.SLOTS] = slots

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._layout.slots

    def take(self, model: int = 0) -> int | None:
        """Returns a free slot, marked WRITING; None when all are in use, or too many of them by this model.

        A model may have at most `MOST_PER_FREE_SLOT` times as many slots as stay free but for one, which is for models
        that have none. So a model that is alone gets nearly all of them, and one whose requests pile up, or leave
        slowly, always leaves some to the others.

        `model` is the index of the model version that the request is for.
        """
        free, held = self._free, self._held[model]
        if not free or (held and held >= MOST_PER_FREE_SLOT * (len(free) - 1)):
            return None
        slot = free.pop()
        self._model_of[slot] = model
        self._held[model] = held + 1
        self._warm -= self._request_reserved[slot] + self._other_held[slot]
        if slot >= self._highest:
            self._highest = slot + 1
        generation = self._generations[slot] = self._generations[slot] + 1
        self._cancels[slot] = 0
        self._states[slot] = generation << _GENERATION_SHIFT | SlotState.WRITING
        return slot

    def body_room(self, slot: int, length: int) -> memoryview:
        """Reserves room for `length` body bytes outside the slot and returns exactly that view.

        Raises:
            SharedMemoryFull: /dev/shm is full.
        """
        start = self._layout.request_payload(slot) + layout.HEAD_ROOM
        have = self._request_reserved[slot]
        if length > have:
            more = (length - have + layout.PAGE - 1) // layout.PAGE * layout.PAGE
            self.segment.memory.reserve(start + have, more)
            self.segment.memory.populate(start + have, more)
            self._request_reserved[slot] = have + more
        return self._buffer[start : start + length]

    def body_reserved(self, slot: int) -> int:
        """Returns how many body bytes the slot has room for already, from requests before this one."""
        return self._request_reserved[slot]

    def submit(self, slot: int, batcher: int, request: Request) -> None:
        """Writes a request into its slot and pushes it; the batcher sees it after `publish`.

        The slot is from `take`, for the model that the request goes to.

        Raises:
            SharedMemoryFull: the request does not fit inline and /dev/shm is full; the slot is still WRITING.
        """
        if write_request(self.segment, slot, batcher, request, self.body_room):
            self._other_held[slot] = max(self._other_held[slot], layout.HEAD_ROOM)
        generation = self._generations[slot]
        self._states[slot] = generation << _GENERATION_SHIFT | SlotState.READY
        self._rings[batcher].push(slot, request.target.model, generation, request.idle_us)
        self._submitted[slot] = 1
        self.in_flight += 1

    def submit_again(self, slot: int, batcher: int, model: int, arrival_ns: int) -> None:
        """Submits the request of an answered slot once more, under its next generation; it is not written again.

        The slot is answered, and not released; `arrival_ns` is the monotonic time that counts as the request's arrival.
        """
        self._held[self._model_of[slot]] -= 1
        self._held[model] += 1
        self._model_of[slot] = model
        self._quiet.discard(slot)
        generation = self._generations[slot] = self._generations[slot] + 1
        rewrite_header(self.segment, slot, batcher, model, arrival_ns)
        self._cancels[slot] = 0
        self._states[slot] = generation << _GENERATION_SHIFT | SlotState.READY
        self._rings[batcher].push(slot, model, generation, layout.NOT_RETURNING)
        self._submitted[slot] = 1

    def publish(self) -> None:
        """Shows the batchers what was submitted since the last call; wakes those that sleep. Shows the slots in use."""
        self._board_words[self._web_row + WebWord.SLOTS_IN_USE] = len(self._states) - len(self._free)
        for ring, bell in zip(self._rings, self._bells, strict=True):
            if ring.publish():
                bell.ring(layout.News.SUBMISSION)

    def unpublished(self, batcher: int) -> int:
        """Returns how many requests were submitted to a batcher since the last `publish`."""
        return self._rings[batcher].unpublished

    def answered(self) -> list[int]:
        """Slots with news: an answer, the beginning of one, or chunks of a stream to take (one vectorised scan).

        A stream that is being read, or that nobody waits for, and that has nothing to take is none: its handler may be
        silent for as long as it likes.
        """
        if not self.in_flight:
            return []
        if self._scan is None:
            self._scan = self._low_bytes()
        found: list[int] = (self._scan[: self._highest] >= layout.FIRST_ANSWERED).nonzero()[0].tolist()
        states, generations, submitted = self._states, self._generations, self._submitted
        for slot in found:
            if not submitted[slot] or states[slot] >> _GENERATION_SHIFT != generations[slot]:
                found = self._mended(found)
                break
        if found and self._quiet:
            return [slot for slot in found if slot not in self._quiet or self._has_moved(slot)]
        return found

    def _low_bytes(self) -> Any:
        """Returns the low byte of each state word, as one array: the scan for answers is a single comparison."""
        # With the first request: many processes never have one, and numpy takes an eighth of a second, and 15 MB.
        np = import_module("numpy")
        low_byte = 0 if sys.byteorder == "little" else layout.WORD - 1
        return np.frombuffer(self._states, dtype=np.uint8)[low_byte :: layout.WORD]

    def look_over(self) -> None:
        """Finds state words that were written over so that nobody would ever answer; to be called from time to time."""
        states, generations, submitted = self._states, self._generations, self._submitted
        for slot in range(self._highest):
            if submitted[slot] and states[slot] >> _GENERATION_SHIFT != generations[slot]:
                self._mended([slot])

    def _mended(self, found: list[int]) -> list[int]:
        """Mends state words that a stray write has changed; returns the slots of which there is news all the same.

        What was submitted is answered with an error. All else is this process's own, and stays as it was.
        """
        news = []
        for slot in found:
            generation = self._generations[slot] << _GENERATION_SHIFT
            if not self._submitted[slot]:
                self._states[slot] = generation | SlotState.WRITING
                log.error("The state of slot %d of segment %d was written over", slot, self.segment.index)
                continue
            if self._states[slot] & ~_STATE_MASK != generation:
                self._states[slot] = generation
                self.segment.fail(slot, 500, DAMAGED)
                self._put_aside(slot)
            news.append(slot)
        return news

    def may_use(self, slot: int) -> bool:
        """Whether a slot may be submitted again: no model worker can write into it any more."""
        return slot not in self._set_aside

    def _put_aside(self, slot: int) -> None:
        if slot not in self._set_aside:
            self._set_aside.add(slot)
            log.error(
                "The state of slot %d of segment %d was written over while its request was under way: its client gets "
                "an error, and the slot is used no more. A handler writes where it should not; mend it, and restart "
                "the server",
                slot,
                self.segment.index,
            )

    def _has_moved(self, slot: int) -> bool:
        """Returns whether a stream has chunks to take, or has ended."""
        return self.state(slot) != SlotState.STREAMING or stream.has_chunks(self.segment, slot)

    def state(self, slot: int) -> int:
        """Returns the slot's SlotState."""
        return self._states[slot] & _STATE_MASK

    def answer(self, slot: int) -> Answer:
        """Reads the answer (or, for a STREAMING slot, the status and headers of what is being streamed).

        From now on only the chunks of a streamed answer, and its end, are news (see `answered`). An error is a plain
        `ServerError`, or a `ServiceUnavailable` without a text where the batcher has refused the request: what it means
        for this model, the caller knows.
        """
        answer, held = read_answer(self.segment, slot, self._states[slot] & _STATE_MASK == SlotState.FAILED)
        if answer.error is not None and is_unanswered(self.segment, slot):
            self._put_aside(slot)
        if held:
            self._other_held[slot] = max(self._other_held[slot], held)
        if answer.stream is not None:
            self._quiet.add(slot)
        return answer

    def answer_range(self, slot: int) -> tuple[int, int, int, int]:
        """Where the body of an answer lies that stays in its slot (see `request_codec.answer_range`)."""
        found = answer_range(self.segment, slot)
        _, length, status, flags = found
        if not status and is_unanswered(self.segment, slot):
            self._put_aside(slot)
        held = length if flags & layout.ResponseFlag.BODY_OUTSIDE else 0
        if flags & layout.ResponseFlag.HEAD_OUTSIDE:
            held += layout.ANSWER_HEAD_ROOM
        if held:
            self._other_held[slot] = max(self._other_held[slot], held)
        return found

    def keep_for_sending(self, slot: int) -> None:
        """Marks an answered slot whose body is still needed: `answered` leaves it out from now on."""
        self._states[slot] = self._generations[slot] << _GENERATION_SHIFT | SlotState.SENDING
        self._submitted[slot] = 0

    def read_stream(self, slot: int) -> list[bytes]:
        """Takes all chunks that lie in a streamed answer's ring and makes room for more."""
        return stream.take_chunks(self.segment, slot)

    def cancel(self, slot: int) -> None:
        """Tells batcher and model worker that nobody waits for this slot any more."""
        self._cancels[slot] = 1
        self._quiet.add(slot)

    def abandon(self, slot: int) -> None:
        """Gives back a slot that was taken but never submitted."""
        self.in_flight += 1
        self.release(slot)

    def release(self, slot: int) -> None:
        """Gives an answered slot back; beyond the warm budget its payload pages are freed."""
        self.in_flight -= 1
        self._held[self._model_of[slot]] -= 1
        if self._quiet:
            self._quiet.discard(slot)
        held = self._request_reserved[slot] + self._other_held[slot]
        if held:
            if self._warm + held > self._warm_limit:
                self._give_back(slot)
            else:
                self._warm += held
        self._states[slot] = self._generations[slot] << _GENERATION_SHIFT
        self._submitted[slot] = 0
        if slot not in self._set_aside:
            self._free.append(slot)

    def _give_back(self, slot: int) -> None:
        memory = self.segment.memory
        try:
            memory.give_back(self._layout.request_payload(slot), self._layout.payload_stride)
        except OSError as error:  # the pages stay for the next request in this slot
            log.warning("Shared memory of slot %d is kept: %s", slot, error)
            self._warm += self._request_reserved[slot] + self._other_held[slot]
            return
        self._request_reserved[slot] = self._other_held[slot] = 0
