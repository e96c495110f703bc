"""One request as its batcher knows it. Pure: the words of shared memory that it looks at are passed in.

A slot is used again as soon as its answer has been fetched, which may be before the batcher hears that the model worker
is done. So a job is told from the requests before and after it in the same slot by the slot's generation (README,
rule 5), and by nothing else: all that is asked of a job here holds for that one request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, NOT_RETURNING, STATE_MASK, SlotState

_WITH_WORKER = (SlotState.CLAIMED, SlotState.RUNNING, SlotState.STREAMING)


class SlotTable(Protocol):
    """The segment that a job lies in (see `segments.AttachedSegment`); the scheduler only reads, the loop answers."""

    mail_base: int
    retired: bool
    states: memoryview
    cancels: memoryview

    def ids(self, slot: int) -> tuple[str, str]:
        """The ids of the slot's sequence ("" where its model has none) and of its request."""

    def head(self, slot: int) -> tuple[bytes, int]:
        """The head of the slot's request, and the length of its body."""

    def fail(self, slot: int, status: int, text: str) -> None:
        """Answers a slot with an error."""


@dataclass(slots=True, eq=False, repr=False)
class Job:
    """A request whose slot is CLAIMED by this batcher.

    Attributes:
        segment: the segment that it lies in.
        slot: its slot.
        generation: the slot's generation while it is this request's.
        arrived_ns: when its first byte arrived (monotonic).
        named: whether it named the model's version.
        came_at: when the batcher took it in (monotonic seconds).
        idle_us: microseconds since the answer before it on its connection; NOT_RETURNING for a connection's first.
        deliveries: how many workers ended with it in their hands and had not begun it.
        sequence: its sequence, once it has been given to a worker, where the model has sequences.
    """

    segment: SlotTable
    slot: int
    generation: int
    arrived_ns: int
    named: bool
    came_at: float
    idle_us: int = NOT_RETURNING
    deliveries: int = 0
    sequence: Sequence | None = None

    def __repr__(self) -> str:
        return f"<Job segment {self.segment.mail_base >> 32} slot {self.slot} generation {self.generation}>"

    @property
    def state(self) -> int:
        """The job's SlotState; FREE when its slot is the next request's by now."""
        word = self.segment.states[self.slot]
        return word & STATE_MASK if word >> GENERATION_SHIFT == self.generation else SlotState.FREE

    @property
    def is_with_worker(self) -> bool:
        """Whether it was dispatched and has no answer yet."""
        return self.state in _WITH_WORKER

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of its sequence ("" where its model has none) and of the request."""
        return self.segment.ids(self.slot)

    def is_over(self, oldest_ns: int) -> bool:
        """Whether it is not to be begun any more: its client has gone, or it arrived before `oldest_ns`."""
        return self.arrived_ns < oldest_ns or bool(self.segment.cancels[self.slot])


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One live sequence.

    Attributes:
        key: its id.
        created_at: monotonic seconds.
        active_at: when a request of it last came or ended.
        worker: the worker that has it; None while it waits for one.
        running: whether a request of it is with the worker.
        jobs: those that wait.
    """

    key: str
    created_at: float
    active_at: float
    worker: int | None = None
    running: bool = False
    jobs: deque[Job] = field(default_factory=deque)

    def __repr__(self) -> str:
        return f"<Sequence {self.key} worker {self.worker} waiting {len(self.jobs)}>"
