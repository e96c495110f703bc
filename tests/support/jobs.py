"""Jobs for tests of what holds them: their slots lie in plain memory."""

from __future__ import annotations

from array import array

from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.shm.layout import GENERATION_SHIFT, SlotState

SLOTS = 1 << 12


class Slots:
    """The words of a segment, the ids of its requests, and how they were answered.

    Attributes:
        statuses: of the slots that were answered with an error, by slot.
    """

    mail_base = 1 << 32

    def __init__(self) -> None:
        self.states = memoryview(array("Q", bytes(8 * SLOTS)))
        self.cancels = memoryview(array("Q", bytes(8 * SLOTS)))
        self.retired = False
        self.keys: dict[int, str] = {}
        self.statuses: dict[int, int] = {}
        self.heads: dict[int, tuple[bytes, int]] = {}

    def head(self, slot: int) -> tuple[bytes, int]:
        return self.heads.get(slot, (b"POST / HTTP/1.1\r\n\r\n", 0))

    def fail(self, slot: int, status: int, text: str) -> None:
        self.states[slot] = self.states[slot] & ~0xFF | SlotState.FAILED
        self.statuses[slot] = status

    def settle(self, slot: int) -> None:
        self.states[slot] = self.states[slot] & ~0xFF | SlotState.FAILED

    def claim_again(self, slot: int) -> None:
        self.states[slot] = self.states[slot] & ~0xFF | SlotState.AGAIN

    def ids(self, slot: int) -> tuple[str, str]:
        return self.keys.get(slot, ""), f"request-{slot}"


class Jobs:
    """Makes jobs whose slot is their number."""

    def __init__(self) -> None:
        self.segment = Slots()

    def job(self, number: int, came_at: float = 0.0, key: str = "") -> Job:
        """A CLAIMED job of generation 1, of the sequence `key`."""
        self.segment.keys[number] = key
        self.segment.states[number] = 1 << GENERATION_SHIFT | SlotState.CLAIMED
        return Job(self.segment, number, 1, 0, False, came_at)

    def answer(self, job: Job) -> None:
        """Its slot is DONE."""
        self.segment.states[job.slot] = job.generation << GENERATION_SHIFT | SlotState.DONE

    def take_again(self, job: Job) -> None:
        """Its slot has the next request, which a worker has."""
        self.segment.states[job.slot] = job.generation + 1 << GENERATION_SHIFT | SlotState.CLAIMED
