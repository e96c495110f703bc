"""One request's story in plain text: what `wsgi-ts explain` prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from wsgi_ts.tracing.records import QUEUED, RUNNING, STAGES

#: What is said of why a batch went.
_REASONS: Final = {
    "full": "it was full",
    "delay": "its oldest request had waited for maxBatchDelay",
    "idle": "no other client was expected",
    "adaptive": "other clients were expected, but not soon enough to be worth the wait",
    "no_wait": "this model never waits for a batch to fill",
    "joined": "its requests joined those that were under way",
    "sequence": "they were the next requests of their sequences",
    "plugin": "the batching plugin said so",
    "suspect": "a worker had ended with the next request in its hands, so that was left out",
    "unknown": "the batcher that knew has ended",
}
_KEPT: Final = {
    "slow": "it was among the slowest of its model in that minute, or above trace_slow_ms",
    "failed": "it failed",
    "sampled": "its trace is recorded",
}
#: Where a request was when nobody waited for it any more.
_LEFT: Final = {QUEUED: "  no worker had begun it", RUNNING: "  a worker was running it"}
_IN_BATCH: Final = ("handover", *STAGES)
_MOST_NEIGHBOURS: Final = 8
_BAR: Final = 30


def explained(story: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines.

    Args:
        story: what the supervisor says of a request (`TraceStore.explain`): the request's record under `trace`, that
            of its batch under `batch`, None where it is not known.
    """
    trace = story["trace"]
    yield f"Request {trace['request_id']}"
    yield f"  {trace['method']} {trace['path']}  ({trace['protocol']})"
    yield f"  came {_clock(trace['started'])}, was answered {trace['status']} after {_ms(trace['duration_ms'])}"
    if trace["error"]:
        yield f"  error: {trace['error']}"
    version = f" {trace['version']}" if trace["version"] else ""
    kind = "workflow" if trace["protocol"] == "workflow" else "model"
    yield f"  {kind} {trace['model']}{version}" + (f", trace {trace['trace_id']}" if trace["trace_id"] else "")
    yield f"  kept because {_KEPT[trace['kept_because']]}"
    yield ""
    yield from _timeline(trace)
    if trace["batch_size"] is not None:
        yield ""
        yield from _batch(trace, story["batch"])


def _timeline(trace: Mapping[str, Any]) -> Iterator[str]:
    spans, whole_ms = trace["spans"], trace["duration_ms"] or 0.001
    names = [f"{_indent(span)}{span['name']}" for span in spans]
    width = max(map(len, names))
    yield f"  {'':<{width}}  {'from':>10}  {'for':>10}"
    for name, span in zip(names, spans, strict=True):
        start, took = span["start_ms"], span["duration_ms"]
        before = min(_BAR - 1, int(_BAR * max(0.0, start) / whole_ms))
        bar = "#" * min(_BAR - before, max(1, round(_BAR * took / whole_ms)))
        outcome = span["attributes"].get("outcome", "")
        told = f"  {outcome}" if outcome and outcome != "done" else _LEFT.get(span["attributes"].get("state"), "")
        yield f"  {name:<{width}}  {_ms(start):>10}  {_ms(took):>10}  {' ' * before}{bar}{told}".rstrip()


def _indent(span: Mapping[str, Any]) -> str:
    """Parts of a node stand below it, and parts of a batch below that."""
    return "  " * (("node" in span["attributes"]) + (span["name"] in _IN_BATCH))


def _batch(trace: Mapping[str, Any], batch: Mapping[str, Any] | None) -> Iterator[str]:
    size = trace["batch_size"]
    number = next((span["attributes"]["batch.number"] for span in trace["spans"] if span["name"] == "batch"), "?")
    reason = trace["batch_close_reason"]
    shared = "alone" if size == 1 else f"with {size - 1} other{'s' if size > 2 else ''}"
    yield f"Batch {number} of worker {trace['worker']}: {shared}; it went because {_REASONS[reason]} ({reason})"
    if batch is None:
        return
    if batch["ranks"]:
        yield f"  run by {batch['ranks']} ranks"
    others = [each for each in batch["requests"] if each != trace["request_id"]]
    for other in others[:_MOST_NEIGHBOURS]:
        yield f"  with {other}"
    if len(others) > _MOST_NEIGHBOURS:
        yield f"  and {len(others) - _MOST_NEIGHBOURS} more"
    if batch["fault"]:
        yield f"  the handler raised {batch['fault']}"
        yield f"  (its traceback is in model_log.log, under W-{batch['worker']}-{batch['model']}_{batch['version']})"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
