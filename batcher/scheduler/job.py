"""One request as its batcher knows it, and the queue it waits in. Pure: the shared words it looks at are passed in.

A slot is used again as soon as its answer has been fetched, which may be before the batcher hears that the model worker
is done. So a job is told from the requests before and after it in the same slot by the slot's generation (README,
rule 5), and by nothing else: all that is asked of a job here holds for that one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol

from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, NOT_RETURNING, STATE_MASK, SlotState

_WITH_WORKER: Final = (SlotState.CLAIMED, SlotState.AGAIN, SlotState.RUNNING, SlotState.STREAMING)
#: In these no handler has it.
_UNBEGUN: Final = (SlotState.CLAIMED, SlotState.AGAIN)


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

    def fail(self, slot: int, status: int, text: str, batch: bytes) -> None:
        """Answers a slot with an error, and what is told of its batch (`layout.BATCH`)."""

    def settle(self, slot: int) -> None:
        """Answers a slot with the error that its worker has written, and given back."""

    def claim_again(self, slot: int) -> None:
        """Has a slot wait for another execution."""


class Job:
    """A request whose slot is CLAIMED by this batcher.

    Attributes:
        generation: the slot's generation while it is this request's.
        arrived_ns: when its first byte arrived (monotonic).
        named: whether it named the model's version.
        came_at: when the batcher took it in (monotonic seconds).
        idle_us: microseconds since the answer before it on its connection; NOT_RETURNING for a connection's first.
        deliveries: how many workers ended with it in their hands and had not begun it.
        executions: how often a handler has had it in a batch that failed.
        most: the largest batch that it may be in from now on, since it may be to blame for what happened; 0 for any.
        row: of a request to a workflow's function, the number of the row where it is counted, too, plus one; else 0.
        sequence: its sequence, once it has been given to a worker, where the model has sequences.
    """

    __slots__ = (
        *("arrived_ns", "came_at", "deliveries", "executions", "generation", "idle_us", "most", "named", "segment"),
        *("row", "sequence", "slot"),
    )

    # Written out, since a job is made for every request: a dataclass has an interpreted one where it is compiled, too.
    def __init__(
        self,
        segment: SlotTable,
        slot: int,
        generation: int,
        arrived_ns: int,
        named: bool,
        came_at: float,
        idle_us: int = NOT_RETURNING,
        row: int = 0,
    ) -> None:
        self.segment = segment
        self.slot = slot
        self.generation = generation
        self.arrived_ns = arrived_ns
        self.named = named
        self.came_at = came_at
        self.idle_us = idle_us
        self.row = row
        self.deliveries = self.executions = self.most = 0
        self.sequence: Sequence | None = None

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
    def is_unbegun(self) -> bool:
        """Whether it waits, in the queue or in a mailbox."""
        return self.state in _UNBEGUN

    @property
    def ids(self) -> tuple[str, str]:
        """The ids of its sequence ("" where its model has none) and of the request."""
        return self.segment.ids(self.slot)

    def is_over(self, oldest_ns: int) -> bool:
        """Whether it is not to be begun any more: its client has gone, or it arrived before `oldest_ns`."""
        return self.arrived_ns < oldest_ns or bool(self.segment.cancels[self.slot])


class Found(NamedTuple):
    """A job that was found before its model was known; `state` is what its slot's state was."""

    job: Job
    model: int
    state: int
    has_sequence: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One live sequence.

    Attributes:
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


class JobQueue:
    """The jobs of one model version on one device that wait for a worker, first in first out.

    `offer` refuses what is beyond `capacity`, the model's `job_queue_size`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._jobs: deque[Job] = deque()
        self._returned = 0  # so many of the first were put back

    def __len__(self) -> int:
        return len(self._jobs)

    def __repr__(self) -> str:
        return f"<JobQueue {len(self._jobs)} of {self.capacity}>"

    @property
    def oldest_at(self) -> float:
        """When the first job came; only while there is one."""
        return self._jobs[0].came_at

    @property
    def is_returned(self) -> bool:
        """Whether the first job was put back: it has waited for others already."""
        return self._returned > 0

    def offer(self, jobs: list[Job]) -> list[Job]:
        """Adds jobs at the end; returns those for which there is no room."""
        room = max(0, self.capacity - len(self._jobs))
        if len(jobs) <= room:
            self._jobs.extend(jobs)
            return []
        self._jobs.extend(jobs[:room])
        return jobs[room:]

    def put_back(self, jobs: list[Job]) -> None:
        """Puts jobs that were taken, but not answered, at the head, in their order; never refused."""
        self._jobs.extendleft(reversed(jobs))
        self._returned += len(jobs)

    def take(self, count: int) -> list[Job]:
        """Removes the first `count` jobs, or all if there are fewer."""
        if self._returned:
            self._returned = max(0, self._returned - count)
        popleft = self._jobs.popleft
        return [popleft() for _ in range(min(count, len(self._jobs)))]

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Removes and returns the jobs for which `unwanted` holds."""
        dropped = [job for job in self._jobs if unwanted(job)]
        if dropped:
            gone = set(dropped)
            self._returned = sum([job not in gone for job in islice(self._jobs, self._returned)])
            self._jobs = deque([job for job in self._jobs if job not in gone])
        return dropped
