"""Records of batches, made by the model worker: who was in it, how it was run, and what its handler raised.

Of most batches none is made: of those that failed, that were among the slowest, or that hold a sampled request.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.request_codec import stages_of
from wsgi_ts.batcher.worker.slots import SlotReference
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.log_records import NO_FIELDS, TraceFields
from wsgi_ts.messages import ModelSpec
from wsgi_ts.tracing.context import parse
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.post import Post
from wsgi_ts.tracing.records import BATCH, RANK, batch_ids, batch_key, reason_name
from wsgi_ts.tracing.slowest import Allowance, Slowest

#: Records of failed batches that one worker makes in a second.
_FAILED_PER_S = 20.0
#: What a handler calls its device may be anything.
_MOST_DEVICE = 64


class BatchRun(NamedTuple):
    """How a batch was run.

    Attributes:
        facts: what its slots tell of it (`layout.BATCH`).
        started_ns, ended_ns: when it was begun, and the handler had returned (monotonic).
        took_ns: since its oldest request came.
        fault: what the handler raised, in one line; empty for nothing.
        has_failed: one of its requests, or all, are answered with an error.
        device: what rank 0 computes on, where the worker spans several processes.
    """

    facts: bytes
    started_ns: int
    ended_ns: int
    took_ns: int
    fault: str
    has_failed: bool
    device: str


class RankRun(NamedTuple):
    """What one rank of a group did for a batch.

    Attributes:
        rank: its number on this machine.
        device: what it computes on (`device_of`).
        began_ns, ended_ns: from when to when (monotonic).
        calls: how often it was told to do something: more than once in a pipeline.
        fault: what its handler raised, in one line; empty for nothing.
    """

    rank: int
    device: str
    began_ns: int
    ended_ns: int
    calls: int
    fault: str


class BatchTraces:
    """What one model worker tells of its batches.

    Attributes:
        threshold_ns: from which time on since its oldest request came a batch is to be noted.
    """

    def __init__(self, spec: ModelSpec, options: TraceOptions) -> None:
        self._spec = spec
        self._slowest = Slowest(options.keep, options.slow_ms)
        self._failed = Allowance(_FAILED_PER_S)
        self._kept = Post(options.kept_at) if options.kept_at else None
        self._exported = Post(options.exported_at) if options.exported_at else None
        self.threshold_ns = self._slowest.first

    def look(self, now: float) -> None:
        """Does what is due from time to time (monotonic seconds)."""
        self._slowest.look(now)
        self.threshold_ns = self._slowest.thresholds.get(self._spec.name, self._slowest.first)
        for post in (self._kept, self._exported):
            if post is not None:
                post.flush()

    def note(self, run: BatchRun, refs: Sequence[SlotReference], requests: Sequence[Request]) -> None:
        """Sends the record of a batch that was run just now, where it is worth one."""
        is_kept = self._kept is not None and (
            self._slowest.is_slow(self._spec.name, run.took_ns)
            or (run.has_failed and self._failed.take(run.ended_ns / 1e9))
        )
        self.threshold_ns = self._slowest.thresholds.get(self._spec.name, self._slowest.first)
        sampled = [request for ref, request in zip(refs, requests, strict=True) if ref.sampled]
        if not is_kept and not sampled:
            return
        record = self._record(run, requests)
        if is_kept and self._kept is not None:
            self._kept.send(record)
        if sampled and self._exported is not None:
            self._exported.send({**record, "links": [request.headers.get("traceparent") for request in sampled]})
            if self._spec.ranks:
                own = RankRun(0, run.device, run.started_ns, run.ended_ns, 1, run.fault)
                self._exported.send(rank_record(record["batch"], own))

    def _record(self, run: BatchRun, requests: Sequence[Request]) -> dict[str, Any]:
        posted_ns, number, worker, size, reason, *marks = layout.BATCH.unpack(run.facts)
        began_ns = posted_ns or run.started_ns
        stages = stages_of(*marks)
        return {
            "kind": BATCH,
            "batch": batch_key(worker, number, posted_ns),
            "model": self._spec.name,
            "version": self._spec.version,
            "worker": worker,
            "number": number,
            "size": size,
            "ranks": self._spec.ranks,
            "close_reason": reason_name(reason),
            "posted": time.time() - (time.monotonic_ns() - began_ns) / 1e9,
            "handover_ms": round(max(0, run.started_ns - began_ns) / 1e6, 3),
            "duration_ms": round((run.ended_ns - began_ns) / 1e6, 3),
            "stages": [
                [name, (begin_ns - began_ns) / 1e6, (end_ns - begin_ns) / 1e6] for name, begin_ns, end_ns in stages
            ],
            "fault": run.fault or None,
            "requests": [request.request_id for request in requests],
        }


def rank_record(batch: str, run: RankRun) -> dict[str, Any]:
    """Returns the record of a rank's part in a batch."""
    return {
        "kind": RANK,
        "batch": batch,
        "rank": run.rank,
        "device": run.device,
        "gpu": gpu_of(run.device),
        "began": time.time() - (time.monotonic_ns() - run.began_ns) / 1e9,
        "duration_ms": round((run.ended_ns - run.began_ns) / 1e6, 3),
        "calls": run.calls,
        "fault": run.fault or None,
    }


def device_of(handler: object) -> str:
    """Returns what a handler says it computes on, as TorchServe's do (`device`); else CUDA's device of this process."""
    named = getattr(handler, "device", None)
    if named is not None:
        return str(named)[:_MOST_DEVICE]
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"


def gpu_of(device: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns what the driver calls a CUDA device where this process sees some of the GPUs only; else None.

    `device` is as torch names it, `cuda:1`.
    """
    kind, _, number = device.partition(":")
    seen = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if kind != "cuda" or not (number or "0").isdigit() or int(number or 0) >= len(seen):
        return None
    return seen[int(number or 0)].strip() or None


def line_fields(instance: str, key: str, refs: Sequence[SlotReference], requests: Sequence[Request]) -> TraceFields:
    """Returns what log lines of a handler tell, made while it has these requests; nothing where none is sampled.

    A request that is alone has lines of its own trace. Those of several are in the trace of the batch, whose span has
    links to the requests': which of them a line is about only its handler could say.

    `key` is the batch's (`batch_key`), empty where it has no span; `instance` tells this instance of the server from
    others.
    """
    if not any(ref.sampled for ref in refs):
        return NO_FIELDS
    ids = ",".join(request.request_id for request in requests)
    if len(requests) == 1:
        own = parse(str(requests[0].headers.get("traceparent") or "").encode("latin-1"), b"")
        return TraceFields(own.trace_id, own.span_id, ids) if own is not None else TraceFields(request_ids=ids)
    return TraceFields(*batch_ids(instance, key), ids) if key else TraceFields(request_ids=ids)
