"""The job queue of one model version on one device: bounded, first in first out. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

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

    def offer(self, job: Job) -> bool:
        """Adds a job at the end; False when the queue is full."""
        if len(self._jobs) >= self.capacity:
            return False
        self._jobs.append(job)
        return True

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Puts jobs that were taken but never begun at the head, in their order; never refused."""
        self._jobs.extendleft(reversed(list(jobs)))

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


class TicketQueue(JobQueue):
    """The queue of a model with `useJobTicket`: a job is let in only for a worker that is free to take it now.

    Args:
        capacity: as for `JobQueue`.
        free_workers: how many workers have nothing to do.
    """

    def __init__(self, capacity: int, free_workers: Callable[[], int]) -> None:
        super().__init__(capacity)
        self._free_workers = free_workers

    def offer(self, job: Job) -> bool:
        """Adds a job if a worker is free that no waiting job will get; False otherwise."""
        return len(self) < self._free_workers() and super().offer(job)
