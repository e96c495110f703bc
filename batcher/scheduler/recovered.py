"""What a dead batcher has left, and jobs that come before their model is known. Pure: the present time is passed in.

A batcher that takes the place of a dead one scans the segments before it is told of the models. What was begun is
answered, the other jobs are kept for RECOVERY_S.
"""

from __future__ import annotations

from wsgi_ts.batcher.scheduler.actions import Action, Fail
from wsgi_ts.batcher.scheduler.job import Found, Job, SlotTable
from wsgi_ts.batcher.scheduler.redelivery import NO_WORKER
from wsgi_ts.batcher.shm.layout import WORKER_DIED, ModelWord, SlotState

RECOVERY_S = 5.0


class RecoveredJobs:
    """The jobs without a model.

    Args:
        now: when the batcher begins (monotonic seconds).
    """

    def __init__(self, now: float) -> None:
        self._known_by = now + RECOVERY_S
        self._found: list[Found] = []

    def are_kept(self, now: float) -> bool:
        """Whether a model may still come."""
        return now < self._known_by

    def take_in(self, found: list[Found]) -> list[Action]:
        """Keeps jobs until their models are known; answers those that a worker of an earlier batcher had begun."""
        actions: list[Action] = []
        for each in found:
            # How often one has run that waits for it again, nobody knows any more.
            if each.state in (SlotState.RUNNING, SlotState.STREAMING, SlotState.AGAIN):
                actions.append(Fail(each.model, [each.job], 500, WORKER_DIED, ModelWord.FAILED))
            elif each.state == SlotState.CLAIMED and each.has_sequence:
                # Its sequence's worker has died with the batcher, and what it knew with it.
                actions.append(Fail(each.model, [each.job], NO_WORKER))
            else:
                self._found.append(each)
        return actions

    def take(self, index: int, now: float) -> tuple[list[Job], list[Job]]:
        """Removes the jobs of the model `index`, which is known now, in the order in which they came.

        Returns:
            Those that an earlier batcher had let in, and the others.
        """
        mine = sorted([each for each in self._found if each.model == index], key=lambda each: each.job.arrived_ns)
        self._found = [each for each in self._found if each.model != index]
        for each in mine:
            each.job.came_at = now
        let_in = [each.job for each in mine if each.state == SlotState.CLAIMED]
        return let_in, [each.job for each in mine if each.state != SlotState.CLAIMED]

    def take_late(self, now: float) -> list[Found]:
        """Removes all jobs once no model comes any more."""
        late = [] if self.are_kept(now) else self._found
        self._found = [] if late else self._found
        return late

    def drop(self, segment: SlotTable) -> None:
        """Forgets the jobs of a segment whose web worker is dead."""
        self._found = [each for each in self._found if each.job.segment is not segment]
