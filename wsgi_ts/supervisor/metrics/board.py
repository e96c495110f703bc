"""What the processes of the data path count in shared memory, read for the metrics.

Batchers and web workers write the words of the board as they work (`batcher.layout`); nobody else counts. The board
belongs to the supervisor, so the counts outlive every other process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from wsgi_ts.batcher.pool.life import RESTART_REASONS
from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import BatcherWord, ModelWord, WebWord
from wsgi_ts.metrics.exposition import Family, Histogram
from wsgi_ts.metrics.specification import COUNTER, GAUGE, HISTOGRAM, OWN_PREFIX
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.tracing.records import CLOSE_REASONS

#: Values of one metric: for the values of its dimensions, in the built-in order, the number.
Values = dict[tuple[str, ...], float]

HOST_LEVEL = "Host"
_DEFAULT_VERSION = "default"
#: What web workers count of their answers, by the status.
RESPONSES = {"2xx": WebWord.RESPONSES_2XX, "4xx": WebWord.RESPONSES_4XX, "5xx": WebWord.RESPONSES_5XX}
#: For each metric of requests: the word of those that did not name the version, and the word of those that did.
_REQUESTS_TOTAL = "ts_inference_requests_total"
_REQUESTS = {
    _REQUESTS_TOTAL: (ModelWord.REQUESTS, ModelWord.REQUESTS_NAMED),
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
#: Requests that were not answered as their clients had hoped, by reason.
_FAILURES = {
    "rejected": (ModelWord.REFUSED,),
    "client_gone": (ModelWord.CANCELLED, ModelWord.LEFT),
    "timeout": (ModelWord.EXPIRED, ModelWord.LATE, ModelWord.TIMED_OUT),
    "handler_error": (ModelWord.HANDLER_ERRORS,),
    "worker_died": (ModelWord.FAILED,),
    "other": (ModelWord.OTHER,),
}
_REJECTED = "rejected"
#: Counters: what they are, and the words that make them up.
_COUNTERS = {
    "executions_total": ("Calls of the handler, each for one batch", (ModelWord.EXECUTIONS,)),
    "wasted_executions_total": (
        "Requests that the handler has run for nobody: the client had gone or given up before it was done",
        (ModelWord.LEFT, ModelWord.LATE),
    ),
    "deadline_misses_total": (
        "Requests whose clientTimeoutInMills has passed, in the queue or in the handler",
        (ModelWord.EXPIRED, ModelWord.LATE),
    ),
    "batches_halved_total": (
        "Batches that failed and whose requests ran again, in smaller ones (maxExecutions)",
        (ModelWord.HALVED,),
    ),
}


class ModelCounts(NamedTuple):
    """What has been counted of a model version.

    Attributes:
        labels: the values of MODEL_LABELS; the name is a function's where its row was read.
        words: its words, summed over the batchers; OLDEST_NS is the least of those that are not 0.
        refused: requests that no batcher has seen, as there was no slot or worker for them.
    """

    model: ModelVersion
    labels: tuple[str, str]
    words: list[int]
    refused: int


class BoardMetrics:
    """Reads the board of so many batchers; `hostname` is the value of the host dimension."""

    def __init__(self, board: Board, batchers: int, hostname: str) -> None:
        self._board = board
        self._batchers = batchers
        self._hostname = hostname
        #: Of each model by its number: what its metrics depend on, and the metrics.
        self._kept: dict[int, tuple[tuple[object, ...], list[Family]]] = {}

    def read(self, models: Iterable[ModelVersion]) -> list[ModelCounts]:
        """Reads the words of these models."""
        return [self._counts(model, model.spec.name, model.spec.index) for model in models]

    def _counts(self, model: ModelVersion, name: str, row: int) -> ModelCounts:
        refusals = self._board.words[layout.BOARD_REFUSALS : layout.BOARD_HTTP][row :: layout.MAX_MODELS]
        return ModelCounts(model, (name, model.spec.version), self._words(row), sum(refusals.tolist()))

    def _named(self, models: Iterable[ModelCounts]) -> Iterator[ModelCounts]:
        """The models that TorchServe has: in place of a version that runs functions, each of them."""
        for counts in models:
            functions = counts.model.spec.functions.values()
            if not functions:
                yield counts
            for function in functions:
                yield self._counts(counts.model, function["model"], function["row"])

    def _words(self, model: int) -> list[int]:
        words = self._board.words
        starts = [self._board.model_row(batcher, model) for batcher in range(self._batchers)]
        rows = [words[start : start + layout.MODEL_WORDS].tolist() for start in starts]
        found = sums(rows)
        found[ModelWord.OLDEST_NS] = min(filter(None, (row[ModelWord.OLDEST_NS] for row in rows)), default=0)
        return found

    def server_values(self, models: Iterable[ModelCounts]) -> dict[str, Values]:
        """The metrics of TorchServe's frontend that are counted on the board.

        What has not been counted yet is left out, as TorchServe knows a label only from its first use on.
        """
        host = (HOST_LEVEL, self._hostname)
        found: dict[str, Values] = {}
        for name, web_word in RESPONSES.items():
            count = responses(self._board, web_word)
            found[f"Requests{name.upper()}"] = {host: count} if count else {}
        for name in _REQUESTS:
            found[name] = {}
        for _, (model_name, model_version), counted, refused in self._named(models):
            for name, words in _REQUESTS.items():
                for version, word in zip((_DEFAULT_VERSION, model_version), words, strict=True):
                    # TorchServe counts a request before it looks whether there is room for it.
                    is_told = name == _REQUESTS_TOTAL and version == _DEFAULT_VERSION
                    if count := counted[word] + (refused if is_told else 0):
                        found[name][model_name, version, self._hostname] = count
        return found | self._last_batch(host)

    def first_counts(self, models: Iterable[ModelVersion]) -> dict[str, Values]:
        """The counters of default versions that had no request yet, at 0; one whose workers are not loaded has none."""
        loaded = [model for model in models if any(worker.is_ready for worker in model.workers.values())]
        names = [name for model in loaded for name in _names(model)]
        return {_REQUESTS_TOTAL: {(name, _DEFAULT_VERSION, self._hostname): 0 for name in names}}

    def answers(self) -> int:
        """How many requests were answered so far, whatever the status."""
        return sum(responses(self._board, word) for word in RESPONSES.values())

    def own_families(self, models: Sequence[ModelCounts]) -> list[Family]:
        """What wsgi-ts counts besides. Used by one thread at a time."""
        families = _families_of([])
        self._kept = {model.model.spec.index: self._kept_of(model) for model in models}
        for _, own in self._kept.values():
            for family, its in zip(families, own, strict=True):
                family.samples.update(its.samples)
        return [*families, *self._slots()]

    def _kept_of(self, model: ModelCounts) -> tuple[tuple[object, ...], list[Family]]:
        """The metrics of one model; those of the last time, where nothing has changed."""
        version = model.model
        state = model.labels, model.refused, len(version.workers), dict(version.restarts), model.words
        kept = self._kept.get(version.spec.index)
        return kept if kept is not None and kept[0] == state else (state, _families_of([model]))

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

    def _slots(self) -> list[Family]:
        """The slots of all segments; those of a dead process do not count."""
        words, rows = self._board.words, [self._board.web_row(row) for row in range(layout.MAX_WEB_ROWS)]
        every = Family(f"{OWN_PREFIX}slots", GAUGE, "Requests that there is room for in shared memory", ())
        used = Family(
            f"{OWN_PREFIX}slots_in_use", GAUGE, "Requests that lie there, from their arrival to the answer", ()
        )
        every.samples[()] = sum(words[row + WebWord.SLOTS] for row in rows)
        used.samples[()] = sum(words[row + WebWord.SLOTS_IN_USE] for row in rows)
        return [every, used]

    def batch_counts(self, model: ModelVersion) -> dict[str, Any]:
        """Batches, the requests in them, the seconds that workers took for them, and requests that were refused."""
        (counted,) = self.read([model])
        words, first = counted.words, ModelWord.BATCH_BUCKETS
        return {
            "batches": sum(words[first : first + len(layout.BATCH_SIZES) + 1]),
            "requests": _inferences(counted),
            "service_s": words[ModelWord.SERVICE_US] / 1e6,
            "refused": words[ModelWord.REFUSED] + counted.refused,
        }


def _names(model: ModelVersion) -> list[str]:
    """What requests call a version: its name, or those of the functions that it runs."""
    return [function["model"] for function in model.spec.functions.values()] or [model.name]


def sums(rows: Sequence[list[int]]) -> list[int]:
    """The sums of the words of several rows of one size, of which there is one at least."""
    return rows[0] if len(rows) == 1 else [sum(column) for column in zip(*rows, strict=True)]


def responses(board: Board, word: int) -> int:
    """One of RESPONSES, summed over the web workers."""
    return sum(
        board.words[row + word] for row in (*map(board.web_row, range(layout.MAX_WEB_ROWS)), board.control_web_row)
    )


def _families_of(models: Sequence[ModelCounts]) -> list[Family]:
    """Everything that is counted of models; the same metrics in the same order, whatever models there are."""
    return [*_histograms(models), *_gauges(models), *_counters(models)]


def _histograms(models: Sequence[ModelCounts]) -> list[Family]:
    families = []
    for name, (text, first, sums) in _TIMES.items():
        family = Family(OWN_PREFIX + name, HISTOGRAM, text, MODEL_LABELS)
        for model in models:
            counts = model.words[first : first + len(_SECONDS) + 1]
            family.samples[model.labels] = Histogram(_SECONDS, counts, sum([model.words[word] for word in sums]) / 1e6)
        families.append(family)
    sizes = Family(f"{OWN_PREFIX}batch_size", HISTOGRAM, "Requests in a batch", MODEL_LABELS)
    for model in models:
        first = ModelWord.BATCH_BUCKETS
        counts = model.words[first : first + len(layout.BATCH_SIZES) + 1]
        sizes.samples[model.labels] = Histogram(layout.BATCH_SIZES, counts, _inferences(model))
    return [*families, sizes]


def _inferences(model: ModelCounts) -> int:
    """How many requests have been in a finished batch: each has its place in the histogram of latencies."""
    return sum(model.words[ModelWord.LATENCY_BUCKETS : ModelWord.LATENCY_BUCKETS + len(_SECONDS) + 1])


def _gauges(models: Sequence[ModelCounts]) -> list[Family]:
    queue = Family(f"{OWN_PREFIX}queue_length", GAUGE, "Requests that wait for a model worker", MODEL_LABELS)
    ready = Family(f"{OWN_PREFIX}workers_ready", GAUGE, "Model workers that take requests", MODEL_LABELS)
    wanted = Family(f"{OWN_PREFIX}workers", GAUGE, "Model workers that there should be", MODEL_LABELS)
    for model in models:
        queue.samples[model.labels] = model.words[ModelWord.QUEUED]
        ready.samples[model.labels] = model.words[ModelWord.READY_WORKERS]
        wanted.samples[model.labels] = len(model.model.workers)
    return [queue, ready, wanted]


def _counters(models: Sequence[ModelCounts]) -> list[Family]:
    came = Family(f"{OWN_PREFIX}requests_total", COUNTER, "Requests that came, whatever became of them", MODEL_LABELS)
    runs = Family(f"{OWN_PREFIX}inferences_total", COUNTER, "Requests that model workers have ended", MODEL_LABELS)
    families = [came, runs]
    for model in models:
        named = model.words[ModelWord.REQUESTS_NAMED]
        came.samples[model.labels] = model.refused + named + model.words[ModelWord.REQUESTS]
        runs.samples[model.labels] = _inferences(model)
    for name, (text, words) in _COUNTERS.items():
        family = Family(OWN_PREFIX + name, COUNTER, text, MODEL_LABELS)
        for model in models:
            family.samples[model.labels] = sum([model.words[word] for word in words])
        families.append(family)
    by_reason = (*MODEL_LABELS, "reason")
    failures = Family(f"{OWN_PREFIX}request_failures_total", COUNTER, "Requests that failed, by reason", by_reason)
    closed = Family(f"{OWN_PREFIX}batches_closed_total", COUNTER, "Batches by why they went as they were", by_reason)
    restarts = Family(
        f"{OWN_PREFIX}worker_restarts_total", COUNTER, "Model workers that were started again, by reason", by_reason
    )
    for model in models:
        for reason, words in _FAILURES.items():
            more = model.refused if reason == _REJECTED else 0
            failures.samples[(*model.labels, reason)] = more + sum([model.words[word] for word in words])
        for place, reason in enumerate(CLOSE_REASONS):
            if count := model.words[ModelWord.CLOSED + place]:
                closed.samples[(*model.labels, reason)] = count
        for reason in RESTART_REASONS:
            restarts.samples[(*model.labels, reason)] = model.model.restarts[reason]
    return [*families, failures, closed, restarts]
