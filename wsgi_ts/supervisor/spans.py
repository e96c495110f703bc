"""What processes tell of requests, batches and ranks as OpenTelemetry's spans, made as the messages that are sent.

A sampled request is a span of kind SERVER, by the semantic conventions for HTTP servers, with a child for each part of
it. A batch is a span in a trace of its own, with a link to each sampled request in it; the requests' own spans of the
batch link back. Each of these requests says how its batch was run, and its ids follow from what tells it from others:
a model worker says something only where a batch has failed, or was run by several processes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource

from wsgi_ts import __version__
from wsgi_ts.batcher.shm.request_codec import Times
from wsgi_ts.dataplane.http_facts import client_of, http_facts
from wsgi_ts.dataplane.stories import Told, parts_of, run_of
from wsgi_ts.tracing import span_codec
from wsgi_ts.tracing.batches import BatchTold, RankTold
from wsgi_ts.tracing.context import parse
from wsgi_ts.tracing.otlp import SpanSender
from wsgi_ts.tracing.records import BATCH, RANK, REQUEST, STAGES, batch_ids, batch_key, reason_name
from wsgi_ts.tracing.span_codec import HERE, INTERNAL, REMOTE, SERVER

#: What a part's attributes have of the batch's number.
_NUMBER: Final = "batch.number"
#: Parts of a request that lie within its batch.
_IN_BATCH: Final = ("handover", *STAGES)
#: A batch's requests are answered together: after so long, in seconds, another one is rare, such as a long stream.
_SETTLED_S: Final = 2.0
#: Whose span has been sent is remembered of so many batches: a request that comes late makes no second one.
_MOST_SENT: Final = 4096


class Spans:
    """Turns what is told into spans, gathers them, and gives them to the sender.

    Args:
        instance: tells this instance of the server from others.
        batch: so many spans are sent together.
        every_s: a span waits at most so long for others, in seconds.
    """

    def __init__(self, sender: SpanSender, instance: str, batch: int, every_s: float) -> None:
        self._sender = sender
        self._instance = instance
        self._batch = batch
        self._every_s = every_s
        self._resource = _resource(instance)
        #: Encoded, each as a field of `ScopeSpans`.
        self._spans: list[bytes] = []
        self._batches: dict[str, _Batch] = {}
        #: Keys of batches that have been sent, the oldest first.
        self._sent: dict[str, None] = {}
        #: When what has been gathered is to be sent (monotonic); 0 while there is nothing.
        self.send_at = 0.0
        self._epoch_ns = 0

    def take(self, kind: str, fields: list[Any]) -> None:
        """Takes what was told of a request, a batch or a rank, as JSON has it."""
        # Told just now: what is told is in monotonic time, and the clock's may be set meanwhile.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        if kind == REQUEST:
            self._add_request(Told.from_json(fields))
        elif kind == BATCH:
            self._take_batch(BatchTold(*fields))
        elif kind == RANK:
            self._add_rank(RankTold(*fields))
        if len(self._spans) >= self._batch:
            self.flush()
        elif not self.send_at:
            self.send_at = time.monotonic() + self._every_s

    def flush(self, *, is_last: bool = False) -> None:
        """Gives the sender what has been gathered; but for the last time not the batches whose requests still come."""
        now = time.monotonic()
        self._add_batches(now if is_last else now - _SETTLED_S)
        if self._spans:
            self._sender.send(span_codec.message(self._resource, self._spans), len(self._spans))
        self._spans = []
        self.send_at = now + self._every_s if self._batches else 0.0

    def _add_request(self, told: Told) -> None:
        trace, times = told.trace, run_of(told)
        if trace is None:
            raise ValueError("a request without a trace")
        address, port = client_of(told.peer)
        run = (times.size, times.reason, times.worker) if times is not None else None
        named = told.protocol, told.method, told.path, told.model, told.version, told.status
        state = span_codec.state(trace.state)
        more = state + _request_span(*named, told.head, told.is_tls, address, run, REMOTE if told.parent else HERE)
        more += span_codec.text(b"wsgi_ts.request.id", told.request_id)
        if told.status >= 500:
            more += span_codec.failure(told.error or "failed")
        if told.protocol != "grpc" and port is not None:
            more += span_codec.number(b"client.port", port)
        trace_id, span_id = bytes.fromhex(trace.trace_id), bytes.fromhex(trace.span_id)
        self._add(trace_id, span_id, bytes.fromhex(told.parent), told.arrived_ns, told.answered_ns, more)
        self._add_parts(told, trace_id, span_id, state)

    def _add_parts(self, told: Told, trace_id: bytes, above: bytes, state: bytes) -> None:
        """The children of a request: nodes of a workflow have parts of their own, and so has each batch.

        `above` is the request's span, `state` what all its spans have.
        """
        request = told.request_id, span_codec.link(trace_id, above, REMOTE)
        model, version, node = told.model, told.version, 0
        within_node = within_batch = above
        for part in parts_of(told):
            name, attributes, run = part.name, part.attributes, part.run
            span_id, parent, more = _new_span_id(), within_node, state
            if name in _IN_BATCH:
                parent = within_batch
            elif name == "batch":
                within_batch = span_id
                if run is not None:
                    more += self._gather(run, part.end_ns, model, version, request)
            elif name.startswith("node "):
                parent, within_node, within_batch = above, span_id, span_id
                model, version = told.nodes[node].model, told.nodes[node].version
                node += 1
                if attributes["outcome"] == "failed":
                    more += span_codec.failure("failed")
            if attributes:
                number = attributes.get(_NUMBER)
                if number is not None:  # each has another
                    more += span_codec.number(b"wsgi_ts.batch.number", number)
                more += _part_span(name, tuple([item for item in attributes.items() if item[0] != _NUMBER]))
            else:
                more += span_codec.plain(name)
            self._add(trace_id, span_id, parent, part.begin_ns, part.end_ns, more)

    def _gather(self, run: Times, ended_ns: int, model: str, version: str | None, request: tuple[str, bytes]) -> bytes:
        """Notes that a request was in a batch; returns the link to that.

        `ended_ns` is when its run had ended (monotonic); `request` is its id and the link to its span.
        """
        key = batch_key(run.worker, run.number, run.posted_ns)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = _Batch(*self._ids_of(key), model, version or "")
        batch.run = run
        batch.came_at = time.monotonic()
        batch.ended_ns = max(batch.ended_ns, ended_ns)
        batch.requests[request[0]] = request[1]
        return batch.link

    def _take_batch(self, told: BatchTold) -> None:
        """Takes what the model worker says of a batch that failed, or that several processes have run."""
        batch = self._batches.get(told.batch)
        if batch is None:
            batch = self._batches[told.batch] = _Batch(*self._ids_of(told.batch), told.model, told.version)
        batch.model, batch.version, batch.told = told.model, told.version, told
        batch.came_at = time.monotonic()
        batch.ended_ns = max(batch.ended_ns, told.ended_ns)
        for request_id, parent in zip(told.requests, told.parents, strict=True):
            request = parse(parent.encode("latin-1"), b"")
            if request is not None:
                ids = bytes.fromhex(request.trace_id), bytes.fromhex(request.span_id)
                batch.requests[request_id] = span_codec.link(*ids, REMOTE)

    def _add_batches(self, until: float) -> None:
        """Adds the spans of the batches of which nothing has come since then (monotonic)."""
        for key in [key for key, batch in self._batches.items() if batch.came_at <= until]:
            batch = self._batches.pop(key)
            if key not in self._sent:
                self._add_batch(batch)
                self._sent[key] = None
        while len(self._sent) > _MOST_SENT:
            del self._sent[next(iter(self._sent))]

    def _add_batch(self, batch: _Batch) -> None:
        trace_id, span_id = batch.trace_id, batch.span_id
        run: BatchTold | Times
        stages: Sequence[Sequence[Any]]
        if batch.told is not None:
            run, ranks, fault, stages = batch.told, batch.told.ranks, batch.told.fault, batch.told.stages
        elif batch.run is not None:
            run, ranks, fault, stages = batch.run, 0, "", batch.run.stages()
        else:
            raise ValueError("a batch of which nothing is known")
        more = _batch_span(batch.model, batch.version, run.worker, run.size, ranks, run.reason)
        more += span_codec.failure(fault) + span_codec.number(b"wsgi_ts.batch.number", run.number)
        more += span_codec.texts(b"wsgi_ts.batch.requests", list(batch.requests)) + b"".join(batch.requests.values())
        self._add(trace_id, span_id, b"", run.posted_ns, batch.ended_ns, more)
        for stage, begin_ns, end_ns in stages:
            self._add(trace_id, _new_span_id(), span_id, begin_ns, end_ns, span_codec.plain(stage))

    def _add_rank(self, told: RankTold) -> None:
        """A rank's part in a batch: it may come before the batch's own."""
        trace_id, batch = self._ids_of(told.batch)
        same = (
            ("wsgi_ts.rank", told.rank),
            ("wsgi_ts.device", told.device),
            ("wsgi_ts.gpu", told.gpu),
            ("wsgi_ts.rank.calls", told.calls),
        )
        more = span_codec.shared(f"rank {told.rank}", INTERNAL, same) + span_codec.failure(told.fault)
        self._add(trace_id, _new_span_id(), batch, told.began_ns, told.ended_ns, more)

    def _ids_of(self, key: str) -> tuple[bytes, bytes]:
        trace_id, span_id = batch_ids(self._instance, key)
        return bytes.fromhex(trace_id), bytes.fromhex(span_id)

    def _add(self, trace_id: bytes, span_id: bytes, parent: bytes, begin_ns: int, end_ns: int, more: bytes) -> None:
        """Adds a span; see `span_codec.span`, but for the times, which are monotonic."""
        epoch_ns = self._epoch_ns
        self._spans.append(span_codec.span(trace_id, span_id, parent, epoch_ns + begin_ns, epoch_ns + end_ns, more))


class _Batch:
    """What is known of a batch until its span is sent.

    Attributes:
        trace_id, span_id: of its span.
        model, version: what ran.
        link: to its span.
        run: how it was run, as one of its requests says.
        told: how it was run, as its worker says where there is more to be told.
        ended_ns: the last end of a run in it (monotonic): streams go on for longer than others.
        requests: link to the span of each sampled request in it, by the request's id.
        came_at: when something of it came last (monotonic).
    """

    def __init__(self, trace_id: bytes, span_id: bytes, model: str, version: str) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.model = model
        self.version = version
        self.link = span_codec.link(trace_id, span_id, HERE)
        self.run: Times | None = None
        self.told: BatchTold | None = None
        self.ended_ns = 0
        self.requests: dict[str, bytes] = {}
        self.came_at = 0.0


@lru_cache(maxsize=1024)
def _batch_span(model: str, version: str, worker: int, size: int, ranks: int, reason: int) -> bytes:
    """What the spans of alike batches have in common."""
    attributes = (
        ("wsgi_ts.batch.size", size),
        ("wsgi_ts.batch.close_reason", reason_name(reason)),
        ("wsgi_ts.model.name", model),
        ("wsgi_ts.model.version", version or None),
        ("wsgi_ts.worker", worker),
        ("wsgi_ts.group.size", ranks or None),
    )
    return span_codec.shared(f"batch {model}", INTERNAL, attributes)


@lru_cache(maxsize=256)
def _request_span(
    protocol: str,
    method: str,
    path: str,
    model: str,
    version: str | None,
    status: int,
    head: str,
    is_tls: bool,
    address: str,
    run: tuple[int, int, int] | None,
    flags: int,
) -> bytes:
    """What the spans of alike requests have in common: most clients send the same head again and again.

    The parameters are those of `Told`, but for the client's `address`, what tells of a batch (`run`: size, reason and
    worker), and the `flags` of the span.
    """
    if protocol == "grpc":
        name = path.lstrip("/")
        facts: dict[str, Any] = {"rpc.system.name": "grpc", "rpc.method": name}
    else:
        facts = http_facts(head, address, is_tls=is_tls, name=model, is_workflow=protocol == "workflow")
        name = f"{method} {facts['http.route']}"
        facts["http.request.method"] = method
        facts["http.response.status_code"] = status
        facts["url.path"] = path
    facts["wsgi_ts.model.name"] = model
    facts["wsgi_ts.model.version"] = version
    if run is not None:
        size, reason, worker = run
        facts["wsgi_ts.batch.size"] = size
        facts["wsgi_ts.batch.close_reason"] = reason_name(reason)
        facts["wsgi_ts.worker"] = worker
    if status >= 500:
        facts["error.type"] = str(status)
    return span_codec.shared(name, SERVER, (*facts.items(),), flags)


@lru_cache(maxsize=1024)
def _part_span(name: str, attributes: tuple[tuple[str, Any], ...]) -> bytes:
    """What alike parts of requests have in common."""
    return span_codec.shared(name, INTERNAL, tuple([(f"wsgi_ts.{key}", value) for key, value in attributes]))


def _new_span_id() -> bytes:
    return (random.getrandbits(64) or 1).to_bytes(8, "big")


def _resource(instance: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """What has made the spans, by OpenTelemetry's variables; `wsgi-ts` where they give it no name."""
    has_name = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = {} if has_name else {SERVICE_NAME: "wsgi-ts"}
    made = Resource.create({**named, SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance})
    return span_codec.resource(made.attributes, made.schema_url)
