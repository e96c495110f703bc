"""Sequences: requests that belong together go to one model worker, in order, one at a time. Pure.

A `SequenceQueue` takes the place of the job queue for a model with `sequenceBatching`. A sequence begins with its first
request, waits for a worker, stays with it, and ends when no request has come for a while, when it is too old, when the
handler says so, or with its worker. Its id may then be used again: that is a new sequence.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from operator import attrgetter

from wsgi_ts.batcher.scheduler.job import Job, JobQueue, Sequence
from wsgi_ts.batcher.shm.worker_layout import mark_of
from wsgi_ts.messages import ModelSpec

log = logging.getLogger("wsgi_ts.batcher")


class SequenceQueue(JobQueue):
    """The jobs of a model with `sequenceBatching`, by sequence.

    Args:
        workers_here: how many workers take jobs from this queue now; more may have other devices.
    """

    def __init__(self, spec: ModelSpec, workers_here: Callable[[], int]) -> None:
        super().__init__(spec.max_sequences * spec.max_sequence_queue)
        self._most_sequences = spec.max_sequences
        self._most_waiting = spec.max_sequence_queue
        self._workers_here = workers_here
        self._min_workers = spec.min_workers
        self._max_workers = max(1, spec.max_workers)
        self._max_idle_s = spec.sequence_max_idle_ms / 1000
        self._max_age_s = spec.sequence_timeout_ms / 1000 or math.inf
        self._live: dict[str, Sequence] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __repr__(self) -> str:
        return f"<SequenceQueue {self._waiting} in {len(self._live)} sequences>"

    @property
    def oldest_at(self) -> float:
        """When the first of the waiting jobs came; only while there is one."""
        return min(each.jobs[0].came_at for each in self._live.values() if each.jobs)

    @property
    def sequences(self) -> int:
        """How many are live."""
        return len(self._live)

    def offer(self, jobs: list[Job]) -> list[Job]:
        """Adds jobs to their sequences; returns those whose sequence has too many waiting, or is one too many."""
        return [job for job in jobs if not self._take_in(job)]

    def _take_in(self, job: Job) -> bool:
        key, request_id = job.ids
        now = job.came_at
        sequence = self._live.get(key)
        if sequence is not None and self._is_over(sequence, now) and not sequence.jobs:
            self._remove(sequence)
            sequence = None
        if sequence is None:
            sequence = self._begin(key, request_id, now)
            if sequence is None:
                return False
        elif len(sequence.jobs) >= self._most_waiting:
            return False
        sequence.jobs.append(job)
        sequence.active_at = now
        self._waiting += 1
        return True

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Takes in jobs that an earlier batcher had let in; never refused."""
        for job in jobs:
            key, _ = job.ids
            sequence = self._live.get(key) or self._add(key, job.came_at)
            sequence.jobs.append(job)
            self._waiting += 1

    def take(self, count: int) -> list[Job]:
        """Removes the first `count` waiting jobs, whatever their sequences."""
        waiting = sorted((job for each in self._live.values() for job in each.jobs), key=attrgetter("came_at"))
        chosen = set(waiting[:count])
        return self.drop(lambda job: job in chosen)

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Removes and returns the waiting jobs for which `unwanted` holds."""
        dropped = []
        for sequence in self._live.values():
            out = [job for job in sequence.jobs if unwanted(job)]
            if out:
                gone = set(out)
                sequence.jobs = deque([job for job in sequence.jobs if job not in gone])
                dropped += out
        self._waiting -= len(dropped)
        return dropped

    def take_for(self, worker: int, count: int) -> list[Job]:
        """Removes the jobs that a worker is to get now: of each of its sequences the next one, the oldest jobs first.

        It also gets its share of the sequences that wait for a worker.
        """
        mine = [each for each in self._live.values() if each.worker == worker]
        # With minWorkers alone, the sequences of a device that has one of four workers would wait for the other three.
        most = max(1, self._most_sequences // max(1, min(self._min_workers, self._workers_here())))
        waiting = [each for each in self._live.values() if each.worker is None and each.jobs]
        share = min(most - len(mine), max(1, len(waiting) // self._max_workers))
        for sequence in islice(waiting, max(0, share)):
            sequence.worker = worker
            mine.append(sequence)
        ready = sorted((each for each in mine if each.jobs and not each.running), key=lambda each: each.jobs[0].came_at)
        taken = []
        for sequence in ready[:count]:
            job = sequence.jobs.popleft()
            job.sequence = sequence
            sequence.running = True
            taken.append(job)
        self._waiting -= len(taken)
        return taken

    def ended(self, jobs: Iterable[Job], now: float) -> None:
        """Jobs that `take_for` has given out have their answers."""
        for job in jobs:
            if job.sequence is not None:
                job.sequence.running = False
                job.sequence.active_at = now

    def expire(self, now: float) -> list[Job]:
        """Ends the sequences whose time is over; returns the jobs that wait in them, to be refused."""
        return self._end([each for each in self._live.values() if self._is_over(each, now)])

    def end_those_of(self, worker: int) -> list[Job]:
        """Ends the sequences of a worker that is gone, or is to go; returns the jobs that wait in them."""
        return self._end([each for each in self._live.values() if each.worker == worker])

    def end_marked(self, marks: Iterable[int]) -> list[Job]:
        """Ends the sequences that the handler has ended, named by `mark_of`; returns the jobs that wait in them."""
        wanted = set(marks)
        return self._end([each for each in self._live.values() if mark_of(each.key) in wanted]) if wanted else []

    def _begin(self, key: str, request_id: str, now: float) -> Sequence | None:
        """A new sequence, unless there are too many."""
        if len(self._live) >= self._most_sequences:
            for each in [each for each in self._live.values() if not each.jobs and self._is_over(each, now)]:
                self._remove(each)
        if len(self._live) >= self._most_sequences:
            log.warning(
                "Skip the requestId: %s for sequence: %s due to exceeding maxNumSequence: %d",
                *(request_id, key, self._most_sequences),
            )
            return None
        return self._add(key, now)

    def _add(self, key: str, now: float) -> Sequence:
        sequence = self._live[key] = Sequence(key, now, now)
        log.info("added jobGroup for sequenceId:%s", key)
        return sequence

    def _is_over(self, sequence: Sequence, now: float) -> bool:
        if now - sequence.created_at > self._max_age_s:
            return True
        return not sequence.jobs and not sequence.running and now - sequence.active_at > self._max_idle_s

    def _end(self, sequences: list[Sequence]) -> list[Job]:
        waiting: list[Job] = []
        for sequence in sequences:
            waiting += sequence.jobs
            self._remove(sequence)
        self._waiting -= len(waiting)
        return waiting

    def _remove(self, sequence: Sequence) -> None:
        del self._live[sequence.key]
        log.info("Clean jobGroup: %s", sequence.key)
