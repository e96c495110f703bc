"""The records that an instance keeps: the last slow, failed and sampled requests, and the batches that they shared.

The supervisor holds them, so that they outlive the processes that made them; each kind has a ring of its own, so that
many failures do not push out what was slow. They stay as they came until somebody asks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from wsgi_ts.json_lines import decode
from wsgi_ts.tracing.records import BATCH, FAILED, REQUEST, SAMPLED, SLOW

#: The ring of failed requests that no worker has answered: floods of those must not push out what handlers failed at.
_UNSERVED: Final = "unserved"
#: Records of each ring that are kept, of all models together.
_MOST: Final = {SLOW: 1000, FAILED: 500, _UNSERVED: 300, SAMPLED: 200, BATCH: 1500}
_RINGS: Final = {SLOW: (SLOW,), FAILED: (FAILED, _UNSERVED), SAMPLED: (SAMPLED,)}
_OF_REQUESTS: Final = (FAILED, _UNSERVED, SLOW, SAMPLED)
#: What all of a kind may have together, in bytes.
_MOST_OF_A_KIND: Final = 4 * 1024 * 1024
#: Answered where a caller names no number.
DEFAULT_LIMIT: Final = 100
#: The fields of a request's record that are shown; the others are for spans.
_SHOWN: Final = (
    *("request_id", "trace_id", "model", "version", "protocol", "method", "path", "status", "error", "started"),
    *("duration_ms", "kept_because", "batch_size", "batch_close_reason", "worker", "spans"),
)


class Ring:
    """The last records of one kind, as they came."""

    def __init__(self, most: int) -> None:
        self._records: deque[bytes] = deque(maxlen=most)
        self._bytes = 0

    def add(self, data: bytes) -> None:
        """Keeps a record, in place of the oldest ones where there is no room."""
        records = self._records
        if len(records) == records.maxlen:
            self._bytes -= len(records[0])
        records.append(data)
        self._bytes += len(data)
        while self._bytes > _MOST_OF_A_KIND:
            self._bytes -= len(records.popleft())

    def newest_first(self) -> list[bytes]:
        """Returns them all."""
        return list(reversed(self._records))


class TraceStore:
    """Keeps records, and answers what they tell; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rings = {kind: Ring(most) for kind, most in _MOST.items()}

    def add(self, data: bytes) -> None:
        """Keeps one record; of what is none nothing stays."""
        ring = _ring_of(data)
        if ring is not None:
            with self._lock:
                self._rings[ring].add(data)

    def newest(
        self, *, model: str | None = None, status: str | None = None, limit: int | None = None
    ) -> dict[str, Any]:
        """Returns the kept requests, the newest first.

        Only those of one model, or workflow, and only those kept because they are `slow`, `failed` or `sampled`.
        """
        rings = _OF_REQUESTS if status is None else _RINGS.get(status, ())
        found = [each for each in self._read(rings) if model in (None, each["model"])]
        found.sort(key=lambda each: float(each["started"]), reverse=True)
        return {"traces": [self._shown(each) for each in found[: DEFAULT_LIMIT if limit is None else max(0, limit)]]}

    def find(self, request_id: str) -> dict[str, Any] | None:
        """Returns the record of a request; None where none is kept."""
        found = self._found(request_id)
        return None if found is None else self._shown(found)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Returns the record of a request, and under `batch` that of its batch where that is known."""
        found = self._found(request_id)
        return None if found is None else {"trace": self._shown(found), "batch": self._batch_of(found)}

    def _shown(self, record: dict[str, Any]) -> dict[str, Any]:
        return {name: record.get(name) for name in _SHOWN}

    def _found(self, request_id: str) -> dict[str, Any] | None:
        for record in self._read(_OF_REQUESTS, request_id.encode()):
            if record["request_id"] == request_id:
                return record
        return None

    def _batch_of(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a request's batch; where its worker has died with it, what the other requests' records say."""
        key = request.get("batch")
        if key is None:
            return None
        for record in self._read((BATCH,), key.encode()):
            # Functions of a workflow are called one after the other, all in one batch of their worker.
            if record["batch"] == key and request["request_id"] in record["requests"]:
                return record
        others = [each for each in self._read(_OF_REQUESTS, key.encode()) if each.get("batch") == key]
        shown = {name: request[name] for name in ("model", "version", "worker")}
        return {**shown, "requests": [each["request_id"] for each in others], "ranks": 0, "fault": None}

    def _read(self, rings: Iterable[str], containing: bytes = b"") -> Iterable[dict[str, Any]]:
        for ring in rings:
            with self._lock:
                kept = self._rings[ring].newest_first()
            for data in kept:
                if containing in data:
                    yield decode(data)


def _ring_of(data: bytes) -> str | None:
    """Which ring a record belongs to; None for what is no record: handlers could write to the socket, too."""
    try:
        record = decode(data)
        if record["kind"] == BATCH:
            return BATCH if {"batch", "requests", "fault", "ranks"} <= record.keys() else None
        if record["kind"] != REQUEST or not {"request_id", "model", "started", "batch_size"} <= record.keys():
            return None
        why = record["kept_because"]
        is_unserved = why == FAILED and record["batch_size"] is None and record.get("protocol") != "workflow"
        return _UNSERVED if is_unserved else why if why in _RINGS else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
