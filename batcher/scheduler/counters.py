"""What a batcher writes to its rows of the board: counters and gauges of model versions, heartbeat, last batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from wsgi_ts.batcher.scheduler.actions import Record
from wsgi_ts.batcher.scheduler.job import Job
from wsgi_ts.batcher.scheduler.model_queue import ModelQueue
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord, ModelWord
from wsgi_ts.batcher.shm.worker_layout import TALLIED


class CountersByModel(dict[int, "ModelCounters"]):
    """The counters of all model versions of one batcher, by model index, and the batcher's own row.

    Requests to a workflow's functions count twice: as those of the version whose workers run them, and in their
    function's own row.
    """

    def __init__(self, board: Board, batcher: int) -> None:
        super().__init__()
        self._board = board
        self._batcher = batcher
        self._words = board.words
        self._row = board.batcher_row(batcher)

    def __missing__(self, model: int) -> ModelCounters:
        counters = self[model] = ModelCounters(self._words, self._board.model_row(self._batcher, model))
        return counters

    def beat(self, now_ns: int) -> None:
        """Says that the batcher's loop turns; `now_ns` is monotonic."""
        self._words[self._row + BatcherWord.HEARTBEAT_NS] = now_ns

    def going_to_sleep(self) -> None:
        """Says that the loop has read and counted all news, and sleeps now."""
        self._words[self._row + BatcherWord.SLEEPS] += 1

    def arrived(self, model: int, jobs: Sequence[Job]) -> None:
        """Counts requests that have come, of which there is one at least, whatever becomes of them."""
        self[model].arrived(jobs)
        if jobs[0].row:
            for counters, own in self._by_function(jobs):
                counters.arrived(own)

    def dispatched(self, model: int, jobs: Sequence[Job], now: float, reason: int) -> None:
        """Counts a batch that goes to a worker: see `ModelCounters.dispatched`."""
        self[model].dispatched(jobs, now, reason)
        if jobs[0].row:
            for counters, own in self._by_function(jobs):
                counters.count_waits(own, now)

    def _by_function(self, jobs: Sequence[Job]) -> Iterator[tuple[ModelCounters, list[Job]]]:
        for row in {job.row for job in jobs if 0 < job.row <= layout.MAX_MODELS}:  # a damaged slot may say anything
            yield self[row - 1], [job for job in jobs if job.row == row]

    def record(self, ended: Record, now: float) -> None:
        """Counts answered jobs; the times of the last batch are for the gauges that show them."""
        counters, words, row = self[ended.model], self._words, self._row
        counters.answered(ended.jobs, ended.ended_at, ended.service_s)
        if ended.jobs[0].row:
            for function, own in self._by_function(ended.jobs):
                function.count_latencies(own, ended.ended_at)
        if ended.posted_at is not None:
            handover_us = max(0, int((ended.begun_at - ended.posted_at) * 1e6))
            counters.begun(handover_us)
            words[row + BatcherWord.LAST_HANDOVER_US] = handover_us
            waited_us = int(ended.posted_at * 1e6) - ended.jobs[0].arrived_ns // 1000
            words[row + BatcherWord.LAST_QUEUE_US] = max(0, waited_us)
            words[row + BatcherWord.LAST_BATCH_NS] = int(now * 1e9)


class ModelCounters:
    """Counters and gauges of one model version on one batcher, which is their only writer.

    `row` is the first word of its row on the board.
    """

    def __init__(self, words: memoryview, row: int) -> None:
        self._words = words
        self._row = row

    def add(self, word: int, amount: int = 1) -> None:
        """Counts up one ModelWord."""
        self._words[self._row + word] += amount

    def add_tallies(self, tallies: Sequence[int]) -> None:
        """Adds what a model worker has counted, by Tally."""
        for word, amount in zip(TALLIED, tallies):  # noqa: B905 (mostly there are none)
            self._words[self._row + word] += amount

    def show(self, word: int, value: int) -> None:
        """Sets a gauge, one of ModelWord."""
        self._words[self._row + word] = value

    def arrived(self, jobs: Sequence[Job]) -> None:
        """Counts requests that have come, whatever becomes of them."""
        words, row, named = self._words, self._row, sum([job.named for job in jobs])
        words[row + ModelWord.REQUESTS] += len(jobs) - named
        if named:
            words[row + ModelWord.REQUESTS_NAMED] += named

    def dispatched(self, jobs: Sequence[Job], now: float, reason: int) -> None:
        """Counts how long the requests of a batch have waited, and why it goes.

        There is at least one job; `now` is in monotonic seconds, `reason` a `policy.CloseReason`.
        """
        self._words[self._row + ModelWord.CLOSED + reason] += 1
        self.count_waits(jobs, now)

    def count_waits(self, jobs: Sequence[Job], now: float) -> None:
        """Counts how long jobs have waited that go to a worker now (monotonic seconds)."""
        self._count_times(ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED, ModelWord.QUEUE_BUCKETS, jobs, int(now * 1e9))

    def begun(self, handover_us: int) -> None:
        """Counts how long an idle worker took to find a batch that was dispatched to it."""
        words, row = self._words, self._row
        words[row + ModelWord.HANDOVER_US] += handover_us
        words[row + ModelWord.HANDOVER_BUCKETS + bisect_left(layout.TIME_BUCKETS_US, handover_us)] += 1

    def answered(self, jobs: Sequence[Job], ended_at: float, service_s: float) -> None:
        """Counts a finished batch: its size, its service time, and each request's time from arrival to answer.

        There is at least one job; `ended_at` is in monotonic seconds.
        """
        words, row = self._words, self._row
        service_us = int(service_s * 1e6)
        words[row + ModelWord.BATCHES] += 1
        words[row + ModelWord.SERVICE_US] += service_us
        words[row + ModelWord.SERVICE_BUCKETS + bisect_left(layout.TIME_BUCKETS_US, service_us)] += 1
        size = row + bisect_left(layout.BATCH_SIZES, len(jobs))
        words[size + ModelWord.BATCH_BUCKETS] += 1
        words[size + ModelWord.SERVICE_BY_SIZE] += service_us
        words[size + ModelWord.REQUESTS_BY_SIZE] += len(jobs)
        self.count_latencies(jobs, ended_at)

    def count_latencies(self, jobs: Sequence[Job], ended_at: float) -> None:
        """Counts how long jobs took, from their arrivals to their answers (monotonic seconds)."""
        named, buckets = ModelWord.LATENCY_US_NAMED, ModelWord.LATENCY_BUCKETS
        self._count_times(ModelWord.LATENCY_US, named, buckets, jobs, int(ended_at * 1e9))

    def show_load(self, model: ModelQueue) -> None:
        """Sets the gauges that say how many requests the model's queue and its workers have, and since when."""
        words, row, queued = self._words, self._row, len(model.jobs)
        words[row + ModelWord.OUTSTANDING] = model.outstanding
        words[row + ModelWord.QUEUED] = queued
        words[row + ModelWord.OLDEST_NS] = int(model.jobs.oldest_at * 1e9) if queued else 0

    def show_all(self, model: ModelQueue) -> None:
        """Sets the gauges that the model's queue knows."""
        fixed_s, per_request_s = model.policy.cost()
        self.show_load(model)
        self.show(ModelWord.READY_WORKERS, model.ready_workers)
        self.show(ModelWord.FIXED_NS, int(fixed_s * 1e9))
        self.show(ModelWord.PER_REQUEST_NS, int(per_request_s * 1e9))

    def clear_gauges(self) -> None:
        """Zeroes what describes the present, when the model is unloaded; counters stay."""
        for word in (
            *(ModelWord.READY_WORKERS, ModelWord.OUTSTANDING, ModelWord.QUEUED, ModelWord.OLDEST_NS),
            *(ModelWord.KV_CACHE, ModelWord.KV_CACHE_WORKERS, ModelWord.FIXED_NS, ModelWord.PER_REQUEST_NS),
        ):
            self.show(word, 0)

    def _count_times(self, word: int, named_word: int, bucket: int, jobs: Sequence[Job], until_ns: int) -> None:
        """Adds the times from the jobs' arrivals on to two sums, by whether they named the version, and a histogram."""
        words, row = self._words, self._row
        if len(jobs) == 1:  # a lone client's time is mostly the server's
            (job,) = jobs
            took_us = max(0, until_ns - job.arrived_ns) // 1000
            words[row + (named_word if job.named else word)] += took_us
            words[row + bucket + bisect_left(layout.TIME_BUCKETS_US, took_us)] += 1
            return
        arrivals = [job.arrived_ns for job in jobs]
        named = [job.arrived_ns for job in jobs if job.named]
        total_ns = until_ns * len(arrivals) - sum(arrivals)
        if named:
            named_ns = until_ns * len(named) - sum(named)
            words[row + named_word] += max(0, named_ns) // 1000
            total_ns -= named_ns
        words[row + word] += max(0, total_ns) // 1000
        # Those of a batch mostly fall into one bucket, and are then counted at once.
        first, bounds = row + bucket, layout.TIME_BUCKETS_US
        shortest = bisect_left(bounds, (until_ns - max(arrivals)) // 1000)
        longest = bisect_left(bounds, (until_ns - min(arrivals)) // 1000)
        if shortest == longest:
            words[first + shortest] += len(arrivals)
            return
        for moment in arrivals:
            words[first + bisect_left(bounds, (until_ns - moment) // 1000)] += 1
