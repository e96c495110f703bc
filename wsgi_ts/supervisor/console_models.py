"""The models of a console's snapshot: of all that it holds the part that grows with models and workers.

Once a second most of it is what it was the second before. So the JSON of each worker and of each version is kept, made
anew only where something of it has changed, and sent only to those who do not have it; of a version that only counts on
the numbers alone are sent; and what processes have in memory is read of a few at a time.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from operator import itemgetter
from typing import Any, NamedTuple

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.messages import WorkerReport, WorkerState
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord
from wsgi_ts.process import resident_bytes
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.supervisor.metrics.board import sums

#: How old what is known of a process's memory may be, in seconds, before it is read again.
MEMORY_INTERVAL_S = 5.0
#: How many processes are read again for one snapshot: there may be hundreds of them.
MOST_READ = 32
#: Buckets of a histogram of times, and of batch sizes.
TIMES = len(layout.TIME_BUCKETS_US) + 1
_SIZES = len(layout.BATCH_SIZES) + 1
#: Numbers of a model version by the page's names.
_COUNTS = {
    "batches": ModelWord.BATCHES,
    "service_us": ModelWord.SERVICE_US,
    "handover_us": ModelWord.HANDOVER_US,
    "failed": ModelWord.FAILED,
    "cancelled": ModelWord.CANCELLED,
    "expired": ModelWord.EXPIRED,
    "refused": ModelWord.REFUSED,
    "queued": ModelWord.QUEUED,
    "outstanding": ModelWord.OUTSTANDING,
}
#: Those that are the sum of two words.
_SUMS = {
    "requests": (ModelWord.REQUESTS, ModelWord.REQUESTS_NAMED),
    "latency_us": (ModelWord.LATENCY_US, ModelWord.LATENCY_US_NAMED),
    "queue_us": (ModelWord.QUEUE_US, ModelWord.QUEUE_US_NAMED),
}
#: Histograms: first word and number of buckets.
_BUCKETS = {
    "latency": (ModelWord.LATENCY_BUCKETS, TIMES),
    "queue": (ModelWord.QUEUE_BUCKETS, TIMES),
    "service": (ModelWord.SERVICE_BUCKETS, TIMES),
    "batch": (ModelWord.BATCH_BUCKETS, _SIZES),
    "service_by_size_us": (ModelWord.SERVICE_BY_SIZE, _SIZES),
    "requests_by_size": (ModelWord.REQUESTS_BY_SIZE, _SIZES),
}
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
#: The numbers as JSON, to be filled in, and the places of what is filled in: words of a row, behind them the sums.
_NUMBERS = _ENCODE(
    {**dict.fromkeys([*_COUNTS, *_SUMS], "%d"), **{name: ["%d"] * size for name, (_, size) in _BUCKETS.items()}}
)[1:-1].replace('"%d"', "%d")
_FILLED_IN = itemgetter(
    *_COUNTS.values(),
    *range(layout.MODEL_WORDS, layout.MODEL_WORDS + len(_SUMS)),
    *(word for first, size in _BUCKETS.values() for word in range(first, first + size)),
)


class WorkerRow(NamedTuple):
    """All that the console's row of a worker depends on: rows are alike where these are.

    Attributes:
        worker: the worker; what is shown of it itself never changes.
        report: what its batcher has said last; replaced with each change.
        is_leaving: it was told to stop.
        memory: what it has in memory, in bytes.
    """

    worker: WorkerRecord
    report: WorkerReport | None
    is_leaving: bool
    memory: int


@dataclass(slots=True)
class _Known:
    """A version as it was in the last snapshot.

    Attributes:
        number: by which the page knows it; no other version ever has the same.
        revision: the snapshot that something of it changed in; `described_at`, something else than its numbers.
        seen: its workers, their reports, and those that leave, in an order: objects, of which none changes unseen.
        pids: the processes of its workers.
        workers, workers_json: its workers by identity, each with its JSON, and these together.
        counted, numbers_json: its rows on the board, and what they say as JSON, without its braces.
        facts, facts_json: all else that its JSON depends on, and that as JSON, without its braces.
    """

    number: int
    revision: int = 0
    described_at: int = 0
    seen: list[Any] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    workers: dict[int, tuple[WorkerRow, str]] = field(default_factory=dict)
    workers_json: str = ""
    counted: list[bytes] = field(default_factory=list)
    numbers_json: str = ""
    facts: tuple[Any, ...] = ()
    facts_json: str = ""

    def text_since(self, revision: int) -> str:
        """The JSON of all that is shown of it, or of its numbers where nothing else has changed since a revision."""
        numbers = f'{{"id":{self.number},{self.numbers_json}'
        if self.described_at <= revision:
            return numbers + "}"
        return f'{numbers},{self.facts_json},"workers":[{self.workers_json}]}}'


class Models(NamedTuple):
    """The versions of all models for one snapshot.

    Attributes:
        revision: of this snapshot; later ones have higher revisions.
        order: the numbers of all versions, in their order.
        changed: the JSON of those that have changed since the revision that was asked for; where only their numbers
            have, of these and the version's own number.
    """

    revision: int
    order: list[int]
    changed: list[str]


class ModelTexts:
    """The versions of all models as JSON, of which so many were `made` so far; not for several threads at a time."""

    def __init__(self, board: Board, registry: Registry, memory: Memory) -> None:
        self._board = board
        self._registry = registry
        self._memory = memory
        self._known: dict[int, tuple[ModelVersion, _Known]] = {}
        self._numbers = itertools.count(1)
        # Microseconds of a clock that every process sees: a supervisor that has taken over begins above the last one.
        self._first = self._revision = time.monotonic_ns() // 1000
        self.made = 0

    def latest(self, since: int = 0) -> Models:
        """Returns the versions as they are now.

        Args:
            since: the revision of a snapshot that is known already; with one that another process made, or with 0,
                all of them have changed.
        """
        with self._registry.changed:
            defaults = {id(model) for model in self._registry.default_versions()}
            versions = self._registry.all_versions()
            found = [(model, [*model.workers.values()], [*model.leaving.values()]) for model in versions]
        changed = self._memory.refresh()
        before, self._known = self._known, {}
        self._revision += 1
        for model, workers, leaving in found:
            # By its place in memory, which none other can have while it is held here.
            known = before[id(model)][1] if id(model) in before else _Known(next(self._numbers))
            self._known[id(model)] = model, known
            self._renew_workers(known, workers, leaving, changed)
            self._renew(known, model, is_default=id(model) in defaults)
        if since <= self._first:
            since = 0
        all_known = [known for _, known in self._known.values()]
        return Models(
            self._revision,
            [known.number for known in all_known],
            [known.text_since(since) for known in all_known if known.revision > since],
        )

    def _renew_workers(
        self, known: _Known, workers: list[WorkerRecord], leaving: list[WorkerRecord], changed: set[int]
    ) -> None:
        """Makes the JSON of those workers anew that have changed; `changed` are processes with other memory."""
        seen = [*workers, None, *leaving, *[each.report for each in workers], *[each.report for each in leaving]]
        if known.seen == seen and changed.isdisjoint(known.pids):
            return
        rows = [*self._rows(workers, is_leaving=False), *self._rows(leaving, is_leaving=True)]
        before, known.workers = known.workers, {}
        for row in rows:
            last = before.get(id(row.worker))
            if last is None or last[0] != row:
                last = row, _ENCODE(_worker(row))
                self.made += 1
            known.workers[id(row.worker)] = last
        known.workers_json = ",".join(text for _, text in known.workers.values())
        known.pids = {row.report.pid for row in rows if row.report is not None}
        known.seen, known.described_at = seen, self._revision

    def _rows(self, workers: Iterable[WorkerRecord], *, is_leaving: bool) -> Iterator[WorkerRow]:
        for worker in workers:
            report = worker.report
            yield WorkerRow(worker, report, is_leaving, 0 if report is None else self._memory.of(report.pid))

    def _renew(self, known: _Known, model: ModelVersion, *, is_default: bool) -> None:
        """Makes the JSON of a version anew where something of it has changed."""
        board = self._board
        starts = [board.model_row(batcher, model.spec.index) for batcher in sorted(model.loaded_in)]
        counted = [board.words[start : start + layout.MODEL_WORDS].tobytes() for start in starts]
        facts = (
            *(model.spec, model.directory, model.workflow, model.min_workers, model.max_workers),
            *(model.restarts.total(), model.unloading, is_default),
        )
        if known.facts != facts:
            known.facts_json = _ENCODE({**_description(model), "default": is_default})[1:-1]
            known.facts, known.described_at = facts, self._revision
        if known.counted != counted or not known.numbers_json:
            known.numbers_json = _numbers_json([memoryview(row).cast("Q").tolist() for row in counted])
            known.counted = counted
        elif known.described_at < self._revision:
            return
        known.revision = self._revision
        self.made += 1


class Memory:
    """What processes have in memory, read again after some seconds, of the longest known ones first."""

    def __init__(self) -> None:
        #: Bytes, and when they were read (monotonic), in that order.
        self._known: dict[int, tuple[int, float]] = {}

    def refresh(self) -> set[int]:
        """A snapshot is taken: reads some processes again, forgets those that have ended, returns what has changed."""
        now = time.monotonic()
        known = self._known
        changed = set()
        for pid in list(itertools.islice(known, MOST_READ)):
            before, read_at = known[pid]
            if now - read_at < MEMORY_INTERVAL_S:
                break
            del known[pid]
            found = resident_bytes(pid)
            if found:
                known[pid] = found, now
            if found != before:
                changed.add(pid)
        return changed

    def of(self, pid: int) -> int:
        """The bytes of a process; 0 where there is none."""
        if pid <= 0:
            return 0
        found = self._known.get(pid)
        if found is None:
            found = resident_bytes(pid), time.monotonic()
            if found[0]:
                self._known[pid] = found
        return found[0]


def _numbers_json(copies: Sequence[list[int]]) -> str:
    """What is counted of a version, summed over the batchers, as JSON without its braces."""
    words = sums(copies) if copies else [0] * layout.MODEL_WORDS
    added = [words[one] + words[other] for one, other in _SUMS.values()]
    return f'{_NUMBERS % _FILLED_IN(words + added)},"curve":{_ENCODE(_curve(copies))}'


def _description(model: ModelVersion) -> dict[str, Any]:
    spec = model.spec
    return {
        "name": model.name,
        "version": model.version,
        "workflow": model.workflow,
        "url": model.directory.url,
        "handler": spec.handler,
        "batch_size": spec.batch_size,
        "max_batch_delay_ms": spec.max_batch_delay_ms,
        "batch_policy": spec.batching or spec.batch_policy,
        "continuous": spec.continuous_batching,
        "asynchronous": spec.async_communication,
        "sequences": spec.sequence_batching,
        "job_queue_size": spec.job_queue_size,
        "response_timeout_s": spec.response_timeout_s,
        "parallel": spec.parallel_type,
        "min_workers": model.min_workers,
        "max_workers": model.max_workers,
        "restarts": model.restarts.total(),
        "unloading": model.unloading,
    }


def _curve(copies: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """What a batch costs as the batching rule has learnt it, of the batcher that has done most; None: nothing."""
    busiest = max(copies, key=lambda words: words[ModelWord.BATCHES], default=None)
    if busiest is None or not busiest[ModelWord.BATCHES]:
        return None
    fixed_ns, per_request_ns = busiest[ModelWord.FIXED_NS], busiest[ModelWord.PER_REQUEST_NS]
    return {"a_ms": fixed_ns / 1e6, "b_ms": per_request_ns / 1e6} if fixed_ns or per_request_ns else None


def _worker(of: WorkerRow) -> dict[str, Any]:
    worker, report = of.worker, of.report
    row: dict[str, Any] = {
        "id": worker.worker_id,
        "state": WorkerState.STARTING if report is None else report.state,
        "leaving": of.is_leaving,
        "gpus": worker.gpus,
        "since_ms": worker.created_at_ms,
    }
    if report is not None:
        row |= {
            "pid": report.pid,
            "memory": of.memory,
            "since_ms": report.started_at_ms or worker.created_at_ms,
            "load_ms": report.load_ms,
            "progress": report.progress,
            "restarts": report.restarts,
            "last_end": report.exit_reason,
            "last_lines": report.last_lines,
        }
    return row
