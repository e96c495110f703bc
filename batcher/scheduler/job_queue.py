"""Where a request waits: the job queue of one model version on one device, bounded, first in first out. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from wsgi_ts.batcher.scheduler.job import Job


class JobQueue:
    """Jobs that wait for a model worker.

    Args:
        capacity: `job_queue_size`; `offer` refuses beyond it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __repr__(self) -> str:
        return f"<JobQueue {len(self._jobs)} of {self.capacity}>"

    @property
    def oldest_at(self) -> float:
        """When the first job came; only while there is one."""
        return self._jobs[0].came_at

    def offer(self, jobs: list[Job]) -> list[Job]:
        """Adds jobs at the end; returns those for which there is no room."""
        room = self.capacity - len(self._jobs)
        if len(jobs) <= room:
            self._jobs.extend(jobs)
            return []
        room = max(0, room)
        self._jobs.extend(jobs[:room])
        return jobs[room:]

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Puts jobs that were taken but never begun at the head, in their order; never refused."""
        self._jobs.extendleft(reversed(jobs))

    def take(self, count: int) -> list[Job]:
        """Removes the first `count` jobs, or all if there are fewer."""
        popleft = self._jobs.popleft
        return [popleft() for _ in range(min(count, len(self._jobs)))]

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Removes and returns the jobs for which `unwanted` holds."""
        dropped = [job for job in self._jobs if unwanted(job)]
        if dropped:
            gone = set(dropped)
            self._jobs = deque(job for job in self._jobs if job not in gone)
        return dropped
