"""One request as its batcher knows it. Pure: the shared memory it lies in is passed in.

A slot is used again as soon as its answer has been fetched, which may be before the batcher hears that the model worker
is done. So a job is told from the requests before and after it in the same slot by the slot's generation (README,
rule 5), and by nothing else: all that is asked of a job here holds for that one request.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, SLOT_WORDS, STATE_MASK, RequestFlag, SlotState

_VERSION_NAMED = RequestFlag.VERSION_NAMED << 32
_WITH_WORKER = (SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING)


class SlotTable(Protocol):
    """What a job needs of its segment (see `segment.Segment`)."""

    @property
    def index(self) -> int:
        """The segment's number."""

    @property
    def states(self) -> memoryview:
        """One word per slot."""

    @property
    def slot_words(self) -> memoryview:
        """The slots' headers, SLOT_WORDS words each."""

    @property
    def cancels(self) -> memoryview:
        """One word per slot."""

    def fail(self, slot: int, status: int, message: str) -> None:
        """Writes an error answer."""

    def fail_cancelled(self, slot: int) -> None:
        """As `fail`, for a client that has gone."""

    def fail_late(self, slot: int) -> None:
        """As `fail`, for a deadline that has passed."""

    def ids(self, slot: int) -> tuple[str, str]:
        """The ids of the slot's sequence and request."""


class JobSource(Protocol):
    """What a job needs to know of where it came from (see `sources.Source`)."""

    mail_base: int
    retired: bool
    in_mailboxes: int
    touched: bool

    @property
    def segment(self) -> SlotTable:
        """The segment."""


class Job:
    """A request whose slot is CLAIMED, or is about to be, by this batcher.

    Args:
        source: the segment that it lies in.
        slot: its slot.
        generation: the slot's generation while it is this request's.
        arrived_ns: when its first byte arrived (monotonic).
        named: whether it named the model's version.
        came_at: when the batcher took it in (monotonic seconds).

    Attributes:
        deliveries: how many workers ended with it in their hands and had not begun it.
        sequence: its sequence, once it has been given to a worker, where the model has sequences.
    """

    __slots__ = (
        *("arrived_ns", "came_at", "deliveries", "generation", "named"),
        *("sequence", "slot", "source"),
    )

    def __init__(
        self, source: JobSource, slot: int, generation: int, arrived_ns: int, named: bool, came_at: float
    ) -> None:
        self.source = source
        self.slot = slot
        self.generation = generation
        self.arrived_ns = arrived_ns
        self.named = named
        self.came_at = came_at
        self.deliveries = 0
        self.sequence: Sequence | None = None

    def __repr__(self) -> str:
        return f"<Job segment {self.source.segment.index} slot {self.slot} generation {self.generation}>"

    @property
    def state(self) -> int:
        """The job's SlotState; FREE when its slot is the next request's by now."""
        word = self.source.segment.states[self.slot]
        return word & STATE_MASK if word >> GENERATION_SHIFT == self.generation else SlotState.FREE

    @property
    def is_with_worker(self) -> bool:
        """Whether it was handed over and has no answer yet."""
        return self.state in _WITH_WORKER

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of its sequence ("" where its model has none) and of the request."""
        return self.source.segment.ids(self.slot)

    def is_over(self, oldest_ns: int) -> bool:
        """Whether it is not to be begun any more: its client has gone, or it arrived before `oldest_ns`."""
        return self.arrived_ns < oldest_ns or bool(self.source.segment.cancels[self.slot])

    def claim(self) -> None:
        """Marks the slot CLAIMED: from now on it is this batcher's to answer, or to hand over."""
        self.source.segment.states[self.slot] = self.generation << GENERATION_SHIFT | SlotState.CLAIMED

    def fail(self, status: int, text: str) -> None:
        """Answers it with an error. Only while no model worker may write to its slot."""
        self.source.segment.fail(self.slot, status, text)
        self.source.touched = True

    def fail_cancelled(self) -> None:
        """As `fail`: its client has gone."""
        self.source.segment.fail_cancelled(self.slot)
        self.source.touched = True

    def fail_late(self) -> None:
        """As `fail`: its own deadline has passed."""
        self.source.segment.fail_late(self.slot)
        self.source.touched = True


class Sequence:
    """One live sequence.

    Attributes:
        key: its id.
        worker: the worker that has it; None while it waits for one.
        running: whether a request of it is with the worker.
        jobs: those that wait.
        created_at: monotonic seconds.
        active_at: when a request of it last came or ended.
    """

    __slots__ = ("active_at", "created_at", "jobs", "key", "running", "worker")

    def __init__(self, key: str, now: float) -> None:
        self.key = key
        self.worker: int | None = None
        self.running = False
        self.jobs: deque[Job] = deque()
        self.created_at = self.active_at = now

    def __repr__(self) -> str:
        return f"<Sequence {self.key} worker {self.worker} waiting {len(self.jobs)}>"


def job_in(source: JobSource, slot: int, word: int, now: float) -> Job:
    """The job that lies in a slot; whether it names the model's version is a flag in the third word of its header.

    Args:
        source: what its batcher knows of the segment.
        slot: the slot.
        word: its state word.
        now: monotonic seconds.
    """
    words, start = source.segment.slot_words, slot * SLOT_WORDS
    return Job(source, slot, word >> GENERATION_SHIFT, words[start], words[start + 2] & _VERSION_NAMED != 0, now)
