"""The words of one model version on the board, as its batcher writes them. Pure: a view of memory is passed in."""

from __future__ import annotations

from bisect import bisect_left

from wsgi_ts.batcher import layout
from wsgi_ts.batcher.layout import ModelWord


class ModelCounters:
    """Counters and gauges of one model version on one batcher, which is their only writer.

    Args:
        words: the board's words.
        row: the first word of this model version's row.
    """

    def __init__(self, words: memoryview, row: int) -> None:
        self._words = words
        self._row = row

    def add(self, word: int, amount: int = 1) -> None:
        """Counts up one ModelWord."""
        self._words[self._row + word] += amount

    def show(self, word: int, value: int) -> None:
        """Sets a gauge, one of ModelWord."""
        self._words[self._row + word] = value

    def handed_over(self, arrivals_ns: list[int], named_ns: list[int], now: float) -> None:
        """Counts how long the requests of a batch have waited.

        Args:
            arrivals_ns: when each of them arrived; not empty.
            named_ns: the same of those that named the version.
            now: monotonic seconds.
        """
        now_ns = int(now * 1e9)
        self._add_times(ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED, arrivals_ns, named_ns, now_ns)
        self._count_times(ModelWord.QUEUE_BUCKETS, arrivals_ns, now_ns)

    def begun(self, handover_s: float) -> None:
        """Counts how long an idle worker took to find a batch that was handed to it."""
        words, row = self._words, self._row
        handover_us = max(0, int(handover_s * 1e6))
        words[row + ModelWord.HANDOVER_US] += handover_us
        words[row + ModelWord.HANDOVER_BUCKETS + bisect_left(layout.TIME_BUCKETS_US, handover_us)] += 1

    def answered(self, arrivals_ns: list[int], named_ns: list[int], ended_at: float, service_s: float) -> None:
        """Counts a finished batch: its size, its service time, and each request's time from arrival to answer.

        Args:
            arrivals_ns: as for `handed_over`.
            named_ns: as for `handed_over`.
            ended_at: monotonic seconds.
            service_s: how long the handler took, in seconds.
        """
        words, row = self._words, self._row
        service_us = int(service_s * 1e6)
        words[row + ModelWord.BATCHES] += 1
        words[row + ModelWord.SERVICE_US] += service_us
        words[row + ModelWord.SERVICE_BUCKETS + bisect_left(layout.TIME_BUCKETS_US, service_us)] += 1
        words[row + ModelWord.BATCH_BUCKETS + bisect_left(layout.BATCH_SIZES, len(arrivals_ns))] += 1
        ended_ns = int(ended_at * 1e9)
        self._add_times(ModelWord.LATENCY_US, ModelWord.LATENCY_US_NAMED, arrivals_ns, named_ns, ended_ns)
        self._count_times(ModelWord.LATENCY_BUCKETS, arrivals_ns, ended_ns)

    def clear_gauges(self) -> None:
        """Zeroes what describes the present, when the model is unloaded; counters stay."""
        for word in (ModelWord.READY_WORKERS, ModelWord.OUTSTANDING, ModelWord.QUEUED):
            self.show(word, 0)

    def _add_times(self, word: int, named_word: int, since_ns: list[int], named_ns: list[int], until_ns: int) -> None:
        words, row = self._words, self._row
        total_ns = until_ns * len(since_ns) - sum(since_ns)
        if named_ns:
            named_total_ns = until_ns * len(named_ns) - sum(named_ns)
            words[row + named_word] += max(0, named_total_ns) // 1000
            total_ns -= named_total_ns
        words[row + word] += max(0, total_ns) // 1000

    def _count_times(self, first_word: int, since_ns: list[int], until_ns: int) -> None:
        """Adds times to a histogram; those of a batch mostly fall into one bucket, and are then counted at once."""
        words, first, bounds = self._words, self._row + first_word, layout.TIME_BUCKETS_US
        shortest = bisect_left(bounds, (until_ns - max(since_ns)) // 1000)
        longest = bisect_left(bounds, (until_ns - min(since_ns)) // 1000)
        if shortest == longest:
            words[first + shortest] += len(since_ns)
            return
        for moment in since_ns:
            words[first + bisect_left(bounds, (until_ns - moment) // 1000)] += 1
