"""What the processes of the data path count in shared memory, read for the metrics.

Batchers and web workers write the words of the board as they work (`batcher.layout`); nobody else counts. The board
belongs to the supervisor, so the counts outlive every other process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord, ModelWord, WebWord
from wsgi_ts.metrics.exposition import Family, Histogram
from wsgi_ts.metrics.specification import COUNTER, GAUGE, HISTOGRAM, OWN_PREFIX
from wsgi_ts.models.version import ModelVersion

#: Values of one metric: for the values of its dimensions, in the built-in order, the number.
Values = dict[tuple[str, ...], float]

HOST_LEVEL = "Host"
_DEFAULT_VERSION = "default"
_RESPONSES = {
    "Requests2XX": WebWord.RESPONSES_2XX,
    "Requests4XX": WebWord.RESPONSES_4XX,
    "Requests5XX": WebWord.RESPONSES_5XX,
}
#: For each metric of requests: the word of those that did not name the version, and the word of those that did.
_REQUESTS = {
    "ts_inference_requests_total": (ModelWord.REQUESTS, ModelWord.REQUESTS_NAMED),
    "ts_inference_latency_microseconds": (ModelWord.LATENCY_US, ModelWord.LATENCY_US_NAMED),
    "ts_queue_latency_microseconds": (ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED),
}
#: The labels of what is counted for a model version.
MODEL_LABELS = ("model_name", "model_version")
_SECONDS = tuple(bound / 1e6 for bound in layout.TIME_BUCKETS_US)
#: Our histograms of times: what they are, the first word of the buckets, and the words that make up the sum.
_TIMES = {
    "request_latency_seconds": (
        "Time from the arrival of a request to its answer, in seconds",
        ModelWord.LATENCY_BUCKETS,
        (ModelWord.LATENCY_US, ModelWord.LATENCY_US_NAMED),
    ),
    "queue_wait_seconds": (
        "Time from the arrival of a request to its hand-over to a model worker, in seconds",
        ModelWord.QUEUE_BUCKETS,
        (ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED),
    ),
    "inference_seconds": (
        "Time that the handler takes for a batch, in seconds",
        ModelWord.SERVICE_BUCKETS,
        (ModelWord.SERVICE_US,),
    ),
    "handover_seconds": (
        "Time from the hand-over of a batch through shared memory to its begin in an idle model worker, in seconds",
        ModelWord.HANDOVER_BUCKETS,
        (ModelWord.HANDOVER_US,),
    ),
}
#: Requests that no handler has answered, by reason.
_UNANSWERED = {
    "refused": ModelWord.REFUSED,
    "expired": ModelWord.EXPIRED,
    "cancelled": ModelWord.CANCELLED,
    "worker_died": ModelWord.FAILED,
}


class BoardMetrics:
    """Reads one board.

    Args:
        batchers: how many batchers there are.
        hostname: the value of the host dimension.
    """

    def __init__(self, board: Board, batchers: int, hostname: str) -> None:
        self._board = board
        self._batchers = batchers
        self._hostname = hostname

    def server_values(self, models: Iterable[ModelVersion]) -> dict[str, Values]:
        """The metrics of TorchServe's frontend that are counted on the board.

        What has not been counted yet is left out, as TorchServe knows a label only from its first use on.
        """
        host = (HOST_LEVEL, self._hostname)
        found: dict[str, Values] = {}
        for name, web_word in _RESPONSES.items():
            count = self._responses(web_word)
            found[name] = {host: count} if count else {}
        for name in _REQUESTS:
            found[name] = {}
        for model in models:
            for name, words in _REQUESTS.items():
                for version, word in zip((_DEFAULT_VERSION, model.version), words, strict=True):
                    if count := self.count(model, word):
                        found[name][model.name, version, self._hostname] = count
        return found | self._last_batch(host)

    def answers(self) -> int:
        """How many requests were answered so far, whatever the status."""
        return sum(map(self._responses, _RESPONSES.values()))

    def own_families(self, models: Iterable[ModelVersion]) -> list[Family]:
        """What wsgi-ts counts besides."""
        models = list(models)
        return [*self._histograms(models), *self._gauges(models)]

    def _last_batch(self, host: tuple[str, ...]) -> dict[str, Values]:
        """The times of the batch that was finished last, in milliseconds."""
        words = self._board.words
        rows = [self._board.batcher_row(batcher) for batcher in range(self._batchers)]
        last = max(rows, key=lambda row: words[row + BatcherWord.LAST_BATCH_NS])
        if not words[last + BatcherWord.LAST_BATCH_NS]:
            return {"QueueTime": {}, "WorkerThreadTime": {}}
        return {
            "QueueTime": {host: words[last + BatcherWord.LAST_QUEUE_US] / 1000},
            "WorkerThreadTime": {host: words[last + BatcherWord.LAST_HANDOVER_US] / 1000},
        }

    def _histograms(self, models: list[ModelVersion]) -> list[Family]:
        families = []
        for name, (text, first, sums) in _TIMES.items():
            family = Family(OWN_PREFIX + name, HISTOGRAM, text, MODEL_LABELS)
            for model in models:
                counts = self._counts(model, first, len(_SECONDS) + 1)
                total_us = sum(self.count(model, word) for word in sums)
                family.samples[model.name, model.version] = Histogram(_SECONDS, counts, total_us / 1e6)
            families.append(family)
        sizes = Family(f"{OWN_PREFIX}batch_size", HISTOGRAM, "Requests in a batch", MODEL_LABELS)
        for model in models:
            counts = self._counts(model, ModelWord.BATCH_BUCKETS, len(layout.BATCH_SIZES) + 1)
            # Each request of a batch has its place in the histogram of latencies.
            requests = sum(self._counts(model, ModelWord.LATENCY_BUCKETS, len(_SECONDS) + 1))
            sizes.samples[model.name, model.version] = Histogram(layout.BATCH_SIZES, counts, requests)
        return [*families, sizes]

    def _gauges(self, models: list[ModelVersion]) -> list[Family]:
        queue = Family(f"{OWN_PREFIX}queue_length", GAUGE, "Requests that wait for a model worker", MODEL_LABELS)
        ready = Family(f"{OWN_PREFIX}workers_ready", GAUGE, "Model workers that take requests", MODEL_LABELS)
        wanted = Family(f"{OWN_PREFIX}workers", GAUGE, "Model workers that there should be", MODEL_LABELS)
        restarts = Family(
            f"{OWN_PREFIX}worker_restarts_total", COUNTER, "Model workers that were started again", MODEL_LABELS
        )
        unanswered = Family(
            f"{OWN_PREFIX}requests_unanswered_total",
            COUNTER,
            "Requests that no handler has answered: refused at a full queue or without worker, expired in the queue, "
            "cancelled by the client, or lost with a model worker that died",
            (*MODEL_LABELS, "reason"),
        )
        for model in models:
            labels = (model.name, model.version)
            queue.samples[labels] = self.count(model, ModelWord.QUEUED)
            ready.samples[labels] = self.count(model, ModelWord.READY_WORKERS)
            wanted.samples[labels] = len(model.workers)
            restarts.samples[labels] = model.restarts
            for reason, word in _UNANSWERED.items():
                unanswered.samples[(*labels, reason)] = self.count(model, word)
        return [queue, ready, wanted, restarts, unanswered]

    def _counts(self, model: ModelVersion, first_word: int, size: int) -> list[int]:
        """The counts of a histogram."""
        return [self.count(model, first_word + place) for place in range(size)]

    def batch_counts(self, model: ModelVersion) -> dict[str, Any]:
        """Batches, the requests in them, the seconds that workers took for them, and requests that were refused."""
        return {
            "batches": sum(self._counts(model, ModelWord.BATCH_BUCKETS, len(layout.BATCH_SIZES) + 1)),
            "requests": sum(self._counts(model, ModelWord.LATENCY_BUCKETS, len(_SECONDS) + 1)),
            "service_s": self.count(model, ModelWord.SERVICE_US) / 1e6,
            "refused": self.count(model, ModelWord.REFUSED),
        }

    def count(self, model: ModelVersion, word: int) -> int:
        """A word of a model version, summed over the batchers."""
        words = self._board.words
        return sum(words[self._board.model_row(batcher, model.spec.index) + word] for batcher in range(self._batchers))

    def least(self, model: ModelVersion, word: int) -> int:
        """The least value of a word of a model version that is not 0 on all batchers; 0 where it is."""
        words = self._board.words
        rows = [self._board.model_row(batcher, model.spec.index) for batcher in range(self._batchers)]
        return min((words[row + word] for row in rows if words[row + word]), default=0)

    def _responses(self, word: int) -> int:
        """A count of answers, summed over the web workers."""
        board = self._board
        rows = [board.web_row(row) for row in range(layout.MAX_WEB_ROWS)]
        return sum(board.words[row + word] for row in (*rows, board.control_web_row))
