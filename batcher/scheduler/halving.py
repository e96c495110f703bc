"""Batches that failed, of a model whose handler may be called again for the same requests (`maxExecutions`). Pure.

Their requests run again in halves, these in halves again, until the one to blame is alone; every request is given to
the handler at most `maxExecutions` times. A worker that ran out of memory gets smaller batches for a while.
"""

from __future__ import annotations

from wsgi_ts.batcher.scheduler.job import Job

#: How long a worker that ran out of memory gets no batch above half of the one that was too large.
REMEMBERED_S = 60.0


class Halving:
    """What the failed batches of one model version on one batcher have taught."""

    def __init__(self, most_executions: int) -> None:
        self._most_executions = most_executions
        self._sizes: dict[int, tuple[int, float]] = {}

    def again(self, jobs: list[Job]) -> list[Job]:
        """Counts an execution that has failed for these jobs, which ran together; returns those that run again."""
        half = -(-len(jobs) // 2)
        for job in jobs:
            job.executions += 1
            job.most = half
        if len(jobs) == 1:
            return []
        return [job for job in jobs if job.executions < self._most_executions and not job.segment.retired]

    def ran_out_of_memory(self, worker_id: int, together: int, now: float) -> None:
        """Takes note that so many requests were too many for a worker; it may be a later life of it that gets fewer."""
        self._sizes[worker_id] = max(1, together // 2), now + REMEMBERED_S

    def most_for(self, worker_id: int, now: float) -> int | None:
        """The largest batch that a worker is to get; None where nothing is known against the usual one."""
        known = self._sizes.get(worker_id)
        if known is None:
            return None
        most, until = known
        if now < until:
            return most
        del self._sizes[worker_id]
        return None


def may_go_together(jobs: list[Job]) -> int:
    """How many of the first jobs may make one batch: those that may be to blame stay among themselves, and few."""
    if not jobs or not jobs[0].most:
        return next((place for place, job in enumerate(jobs) if job.most), len(jobs))
    most = len(jobs)
    for place, job in enumerate(jobs):
        most = min(most, job.most)
        if not job.most or place >= most:
            return place
    return len(jobs)
