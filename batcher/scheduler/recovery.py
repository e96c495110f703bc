"""Jobs that were found before their models were known: what a dead batcher has left, and what comes meanwhile. Pure.

A batcher that takes the place of a dead one scans the segments before it is told of the models: the jobs wait here.
"""

from __future__ import annotations

from typing import NamedTuple

from wsgi_ts.batcher.scheduler.job import Job, SlotTable
from wsgi_ts.batcher.shm.layout import SlotState

#: How long a new batcher keeps jobs of models it has not been told of yet.
RECOVERY_S = 5.0


class Found(NamedTuple):
    """A job that was found before its model was known; `state` is what its slot's state was."""

    job: Job
    model: int
    state: int
    has_sequence: bool = False


class Recovered:
    """The jobs of unknown models.

    Args:
        now: monotonic seconds; they are kept for RECOVERY_S from now.
    """

    def __init__(self, now: float) -> None:
        self.until = now + RECOVERY_S
        self.found: list[Found] = []

    def take(self, model: int, now: float) -> tuple[list[Job], list[Job]]:
        """Removes the jobs of a model, in the order in which they arrived.

        Returns:
            Those that an earlier batcher had let in (they were CLAIMED), and the others.
        """
        mine = sorted((each for each in self.found if each.model == model), key=_arrived_ns)
        self.found = [each for each in self.found if each.model != model]
        for each in mine:
            each.job.came_at = now
        let_in = [each.job for each in mine if each.state == SlotState.CLAIMED]
        return let_in, [each.job for each in mine if each.state != SlotState.CLAIMED]

    def take_late(self, now: float) -> list[Found]:
        """Removes the jobs whose models have not come in time."""
        late = self.found if now >= self.until else []
        self.found = [] if late else self.found
        return late

    def drop(self, segment: SlotTable) -> None:
        """Removes the jobs of a segment."""
        self.found = [each for each in self.found if each.job.segment is not segment]


def _arrived_ns(found: Found) -> int:
    return found.job.arrived_ns
