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

    def handed_over(self, arrivals_ns: list[int], now: float) -> None:
        """Counts how long the requests of a batch have waited (`now` in monotonic seconds)."""
        waited_ns = int(now * 1e9) * len(arrivals_ns) - sum(arrivals_ns)
        self.add(ModelWord.QUEUE_US, max(0, waited_ns) // 1000)

    def answered(self, arrivals_ns: list[int], ended_at: float, service_s: float) -> None:
        """Counts a finished batch: its service time, and each request's time from arrival to answer."""
        words, row = self._words, self._row
        words[row + ModelWord.BATCHES] += 1
        words[row + ModelWord.SERVICE_US] += int(service_s * 1e6)
        ended_us = int(ended_at * 1e6)
        total = 0
        first, bounds = row + ModelWord.BUCKETS, layout.LATENCY_BUCKETS_US
        for arrival in arrivals_ns:
            latency = ended_us - arrival // 1000
            total += latency
            words[first + bisect_left(bounds, latency)] += 1
        words[row + ModelWord.LATENCY_US] += max(0, total)

    def clear_gauges(self) -> None:
        """Zeroes what describes the present, when the model is unloaded; counters stay."""
        for word in (ModelWord.READY_WORKERS, ModelWord.OUTSTANDING, ModelWord.QUEUED):
            self.show(word, 0)
