"""What one process does for traces of the requests that it answers: begins them, and makes records of those worth one.

Of a request without a trace nothing is asked but how long it took and whether it failed, when it is answered.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from math import log
from typing import Any, Final

from wsgi_ts.batcher.shm.request_codec import Times, read_times
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.dataplane.graph import Node
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.stories import NodeRun, Told, request_record
from wsgi_ts.dataplane.task import STATE_NAMES, State, Task
from wsgi_ts.dataplane.walk import Walk
from wsgi_ts.errors import ServerError
from wsgi_ts.tracing.context import TraceContext, new_trace, parse, with_context
from wsgi_ts.tracing.options import TraceOptions
from wsgi_ts.tracing.post import Post
from wsgi_ts.tracing.records import FAILED, REQUEST, SAMPLED, SLOW
from wsgi_ts.tracing.slowest import Allowance, Slowest

#: Records of failed requests (of those that ran, and of others), and of sampled ones that are neither slow nor failed,
#: that one process keeps in a second.
_FAILED_PER_S: Final = 20.0
_SAMPLED_PER_S: Final = 5.0
_NEVER: Final = 1 << 62
#: To send so much of records costs little more than to send one.
_GATHERED_BYTES: Final = 16384


class RequestTraces:
    """The traces of one process.

    Args:
        default_version: returns the default version of a model; None where there is no such model.
        segment: where the requests lie; None where none do.

    Attributes:
        slowest: says from which time on a request is slow.
        has_spans: traces are begun and exported.
        gap: of the requests without a trace of their own, the one in so many is the next that is sampled: above 1
            `begin` has nothing to do but to count it down.
    """

    def __init__(
        self, options: TraceOptions, default_version: Callable[[str], str | None], segment: Segment | None
    ) -> None:
        self.slowest = Slowest(options.keep, options.slow_ms)
        self.has_spans = bool(options.exported_at)
        self._ratio = options.ratio
        self._default_version = default_version
        self._segment = segment
        self._kept = Post(options.kept_at) if options.kept_at else None
        self._exported = Post(options.exported_at) if options.exported_at else None
        self.gap = self._next_gap()
        self._failed = Allowance(_FAILED_PER_S)
        self._unserved = Allowance(_FAILED_PER_S)
        self._sampled = Allowance(_SAMPLED_PER_S)

    def begin(
        self, head: bytes, traceparent: bytes | None, tracestate: bytes
    ) -> tuple[bytes, TraceContext | None, str]:
        """Begins the server's span of a request, where spans are made.

        `traceparent` is what the client says, None where it says nothing, empty where it does so more than once;
        `tracestate` what else it says, empty for nothing.

        Returns:
            The head that the handler gets, the span where it is recorded, and the client's span where it has one.
        """
        has_one = traceparent is not None or bool(tracestate)
        came = parse(traceparent, tracestate) if traceparent else None
        if came is not None:
            ours = came.child()
        else:
            self.gap -= 1
            if self.gap > 0 and not has_one:
                return head, None, ""
            ours = new_trace(is_sampled=self.gap <= 0)
            if self.gap <= 0:
                self.gap = self._next_gap()
        head = with_context(head, ours, has_one=has_one)
        return head, ours if ours.is_sampled else None, came.span_id if came is not None else ""

    def _next_gap(self) -> int:
        """How many requests it is to the next sampled one: drawn, so that each has the same chance by itself."""
        if not 0.0 < self._ratio < 1.0:
            return 1 if self._ratio else _NEVER
        return 1 + int(log(1.0 - random.random()) / log(1.0 - self._ratio))

    def is_worth_it(self, name: str, status: int, took_ns: int, trace: TraceContext | None) -> bool:
        """Whether to make a record: the request is slow or failed, or its trace is recorded."""
        slowest = self.slowest
        return trace is not None or status >= 400 or took_ns >= slowest.thresholds.get(name, slowest.first)

    def tell(self, told: Told) -> None:
        """Hands over the record of a request that `is_worth_it`."""
        now = time.monotonic()
        self.slowest.look(now)
        because = ""
        if self._kept is not None:
            # Not of what was refused at once: there the client may have named any model.
            if told.submitted_ns and self.slowest.is_slow(told.model, told.answered_ns - told.arrived_ns):
                because = SLOW
            if told.status >= 400:
                # Floods of requests that are refused must not cost the records of those that handlers failed at.
                allowance = self._unserved if told.times is None and not told.nodes else self._failed
                because = FAILED if because or allowance.take(now) else ""
            elif not because and told.trace is not None and self._sampled.take(now):
                because = SAMPLED
        if not because and told.trace is None:
            return
        if because and self._kept is not None:
            self._kept.send(request_record(told, because))
        if told.trace is not None and self._exported is not None:
            # As it is: this may be one request in a hundred, and the exporter has time to make a record of it.
            self._exported.send((REQUEST, told))

    def gather(self) -> None:
        """Has records for the exporter wait for others from now on; `look` must be called about once a second."""
        if self._exported is not None:
            self._exported.gather = _GATHERED_BYTES

    def look(self, now: float) -> None:
        """Does what is due from time to time (monotonic seconds)."""
        self.slowest.look(now)
        for post in (self._kept, self._exported):
            if post is not None:
                post.flush()

    def close(self) -> None:
        """Sends what still waits, and gives the sockets back."""
        for post in (self._kept, self._exported):
            if post is not None:
                post.flush()
                post.close()

    def times_of(self, slot: int) -> Times | None:
        """What an answered slot says of its run; None for no slot."""
        return read_times(self._segment, slot) if slot >= 0 and self._segment is not None else None

    def version_of(self, target: Target) -> str | None:
        """The version that a request went to; None where that has no meaning."""
        if target.graph is not None or target.error is not None:
            return target.version
        return target.version or self._default_version(target.model_name)

    def node_runs(self, walk: Walk[Any]) -> list[NodeRun]:
        """What is told of the nodes of a workflow's request."""
        states = walk.states
        nodes = states.graph.nodes
        return [_node_run(nodes[task.node], task) for task in states.tasks() if task.began_ns]


def _node_run(node: Node, task: Task) -> NodeRun:
    took_ns = task.took_ns or max(0, time.monotonic_ns() - task.began_ns)
    times = Times.unpacked(task.facts) if task.facts and task.state == State.DONE else None
    outcome = STATE_NAMES[task.state]
    return NodeRun(node.name, task.item, task.began_ns, took_ns, outcome, task.attempt, node.model, node.version, times)


def error_text(error: ServerError | None) -> str | None:
    """What a client was told is wrong, in one line."""
    return None if error is None else " ".join(error.message.split())[:1000] or type(error).__name__
