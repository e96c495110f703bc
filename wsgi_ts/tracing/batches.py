"""What is told of a batch: who was in it, how it was run, and what its handler raised."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from wsgi_ts.tracing.records import BATCH, reason_name


class BatchTold(NamedTuple):
    """What a model worker knows of a batch that it has run.

    Attributes:
        batch: its key (`records.batch_key`).
        model, version: what ran.
        worker: the worker's number.
        number: the batch's, in the worker's mailbox.
        size: requests in it.
        ranks: processes that ran it; 0 for the worker alone.
        reason: why it went, a `CloseReason`.
        posted_ns, started_ns, ended_ns: when it was dispatched, it was begun, and the handler had returned (monotonic).
        stages: the handler's, each with its begin and end (monotonic).
        fault: what the handler raised, in one line; empty for nothing.
        requests: ids, for the exporter of the sampled ones only.
        parents: `traceparent` of each sampled request.
    """

    batch: str
    model: str
    version: str
    worker: int
    number: int
    size: int
    ranks: int
    reason: int
    posted_ns: int
    started_ns: int
    ended_ns: int
    stages: Sequence[Sequence[Any]]
    fault: str
    requests: Sequence[str]
    parents: Sequence[str] = ()


class RankTold(NamedTuple):
    """What one rank of a group did for a batch.

    Attributes:
        batch: the batch's key.
        rank: its number on this machine.
        device: what it computes on.
        gpu: what the driver calls that; None where it is the same, or none.
        began_ns, ended_ns: from when to when (monotonic).
        calls: how often it was told to do something: more than once in a pipeline.
        fault: what its handler raised, in one line; empty for nothing.
    """

    batch: str
    rank: int
    device: str
    gpu: str | None
    began_ns: int
    ended_ns: int
    calls: int
    fault: str


def batch_record(told: BatchTold) -> dict[str, Any]:
    """Returns the record of a batch, as it is kept and shown."""
    began_ns = told.posted_ns
    return {
        "kind": BATCH,
        "batch": told.batch,
        "model": told.model,
        "version": told.version,
        "worker": told.worker,
        "number": told.number,
        "size": told.size,
        "ranks": told.ranks,
        "close_reason": reason_name(told.reason),
        "posted": time.time() - (time.monotonic_ns() - began_ns) / 1e9,
        "handover_ms": round(max(0, told.started_ns - began_ns) / 1e6, 3),
        "duration_ms": round((told.ended_ns - began_ns) / 1e6, 3),
        "stages": [
            [name, (begin_ns - began_ns) / 1e6, (end_ns - begin_ns) / 1e6] for name, begin_ns, end_ns in told.stages
        ],
        "fault": told.fault or None,
        "requests": told.requests,
    }
