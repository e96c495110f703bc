"""Records of batches, made by the model worker: who was in it, how it was run, and what its handler raised.

Of most batches none is made: of those that failed, or were among the slowest. Of sampled requests spans are made of
what each of them says; here only what they do not know is told, why it failed and what the ranks of a group did.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.request_codec import stages_of
from wsgi_ts.batcher.worker.slots import SlotReference
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.log_records import NO_FIELDS, TraceFields
from wsgi_ts.messages import ModelSpec
from wsgi_ts.tracing.batches import BatchTold, RankTold, batch_record
from wsgi_ts.tracing.context import parse
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.post import Post
from wsgi_ts.tracing.records import BATCH, RANK, batch_ids, batch_key
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
        # Else the sampled requests, which all know how they were run, say enough of it.
        is_exported = self._exported is not None and (run.has_failed or self._spec.ranks > 0)
        sampled = [request for ref, request in zip(refs, requests, strict=True) if is_exported and ref.sampled]
        if not is_kept and not sampled:
            return
        told = self._told(run, requests if is_kept else sampled)
        if is_kept and self._kept is not None:
            self._kept.send(batch_record(told))
        if sampled and self._exported is not None:
            ids = [request.request_id for request in sampled]
            parents = [str(request.headers.get("traceparent") or "") for request in sampled]
            self._exported.send((BATCH, told._replace(requests=ids, parents=parents)))
            if self._spec.ranks:
                gpu = gpu_of(run.device)
                own = RankTold(told.batch, 0, run.device, gpu, run.started_ns, run.ended_ns, 1, run.fault)
                self._exported.send((RANK, own))

    def _told(self, run: BatchRun, requests: Sequence[Request]) -> BatchTold:
        posted_ns, number, worker, size, reason, *marks = layout.BATCH.unpack(run.facts)
        return BatchTold(
            batch_key(worker, number, posted_ns),
            self._spec.name,
            self._spec.version,
            worker,
            number,
            size,
            self._spec.ranks,
            reason,
            posted_ns or run.started_ns,
            run.started_ns,
            run.ended_ns,
            stages_of(*marks),
            run.fault,
            [request.request_id for request in requests],
        )


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
