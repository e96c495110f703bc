"""The segments that a batcher has attached: how requests are read from one, and answered in it by the batcher.

A segment comes with the web worker that made it and is retired with it; its memory stays attached for as long as a
model worker may still have a slot of it.
"""

from __future__ import annotations

from typing import Final

from wsgi_ts.batcher.scheduler.job import Found, Job
from wsgi_ts.batcher.shm import layout, worker_layout
from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, SLOT_WORDS, STATE_MASK, SlotState
from wsgi_ts.batcher.shm.ring import RingConsumer
from wsgi_ts.batcher.shm.segment import Segment

_CLAIM: Final = SlotState.CLAIMED - SlotState.READY
#: In a slot's third word, behind the model's number.
_VERSION_NAMED: Final = layout.RequestFlag.VERSION_NAMED << 32
_ROW_SHIFT: Final = layout.RequestFlag.ROW_SHIFT + 32
#: States in which a batcher may have left a slot when it was killed; READY ones it had not even seen.
_LEFT_BEHIND: Final = (
    SlotState.READY,
    SlotState.CLAIMED,
    SlotState.AGAIN,
    SlotState.RUNNING,
    SlotState.STREAMING,
)


class AttachedSegment:
    """One attached segment, as the batcher with the number `batcher` sees it.

    Attributes:
        mail_base: what a mailbox calls slot 0 of it; slot n is `mail_base | n`.
        ring: its submission ring for this batcher; what was submitted before is for a scan to find.
        bell: wakes its web worker.
        retired: whether its web worker is dead; then nothing more comes from it.
        touched: whether a slot was answered here since the bell was last rung.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: it is not a segment of this server's layout, or damaged.
    """

    def __init__(self, prefix: str, index: int, batcher: int) -> None:
        self._segment = segment = Segment.attach(prefix, index)
        self._batcher = batcher
        self._words = segment.slot_words
        self.index = index
        self.mail_base = worker_layout.mail_entry(index, 0)
        self.states = segment.states
        self.cancels = segment.cancels
        self.ids = segment.ids
        self.head = segment.head
        self.claim_again = segment.claim_again
        self.ring = RingConsumer(segment, batcher)
        self.bell = segment.bell(prefix)
        self.retired = self.touched = False

    def take_submitted(self, now: float) -> dict[int, list[Job]]:
        """Claims the requests that were submitted since the last call, by their model's index.

        Raises:
            RingDamaged: the ring does not tell what was submitted; `scan` does.
        """
        entries = self.ring.pop_all()
        states, words = self.states, self._words
        by_model: dict[int, list[Job]] = {}
        for place in range(0, len(entries), 2):
            entry = entries[place]
            slot = entry & layout.RING_SLOT_MASK
            word = states[slot]
            generation = word >> GENERATION_SHIFT
            if (
                word & STATE_MASK != SlotState.READY
                or generation & layout.RING_GENERATION_MASK != entry >> layout.RING_GENERATION_SHIFT
            ):
                continue  # a scan has found it before
            states[slot] = word + _CLAIM
            start = slot * SLOT_WORDS
            facts = words[start + 2]
            named = facts & _VERSION_NAMED != 0
            job = Job(self, slot, generation, words[start], named, now, entries[place + 1], facts >> _ROW_SHIFT)
            model = entry >> layout.RING_MODEL_SHIFT & layout.RING_MODEL_MASK
            if model in by_model:
                by_model[model].append(job)
            else:
                by_model[model] = [job]
        return by_model

    def scan(self, now: float, states: tuple[int, ...] = _LEFT_BEHIND) -> list[Found]:
        """The requests for this batcher in slots of these states, in no order; READY ones are claimed.

        The ring's head is where its tail was before the scan. What is published after that and is found READY here
        becomes CLAIMED, and its entry is skipped later; what becomes READY behind the scan's back is published later.
        """
        found = []
        segment, words = self._segment, self._words
        for slot, word in enumerate(self.states):
            state = word & STATE_MASK
            if state not in states:
                continue
            request = layout.REQUEST.unpack_from(segment.buffer, segment.layout.slot(slot))
            if request[7] != self._batcher:
                continue
            if state == SlotState.READY:
                self.states[slot] = word + _CLAIM
            facts = words[slot * SLOT_WORDS + 2]
            named = facts & _VERSION_NAMED != 0
            job = Job(self, slot, word >> GENERATION_SHIFT, request[0], named, now, row=facts >> _ROW_SHIFT)
            found.append(Found(job, request[2], state, has_sequence=request[9] > 0))
        return found

    def fail(self, slot: int, status: int, text: str, batch: bytes) -> None:
        """Answers a slot with an error, and what is told of its batch. Only while no model worker may write to it."""
        self._segment.fail(slot, status, text, batch)
        self.touched = True

    def settle(self, slot: int) -> None:
        """Answers a slot with the error that its worker has written, and given back."""
        self._segment.settle(slot)
        self.touched = True

    def retire(self) -> None:
        """Its web worker is dead: a handler that streams an answer is told so, as of a client that has gone."""
        self.retired = True
        for slot in range(len(self.cancels)):
            self.cancels[slot] = 1

    def close(self) -> None:
        """Detaches it."""
        self.bell.close()
        self._segment.close()
