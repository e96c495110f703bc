"""One request of a workflow as its process knows it: who waits, where its first slot is, how long its nodes took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from wsgi_ts.batcher.shm.request_codec import Request
from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.dataplane.graph_walk import GraphWalk
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.timings import timing_value
from wsgi_ts.errors import RequestTimeout

Waiter = TypeVar("Waiter")

#: With it a client says how long it waits for a workflow's answer, in milliseconds.
DEADLINE_HEADER = b"x-request-timeout-ms"


class Walk(Generic[Waiter]):
    """One request of a workflow.

    Attributes:
        handle: the number under which the exchange knows the request.
        waiter: who waits for its answer.
        target: where it goes.
        states: what its nodes do.
        request_id, head: of what the client has sent, as all nodes get them.
        first_slot: where that lies.
        began_ns: when it came (monotonic).
        deadline_ns: when its client gives up, or the workflow's own time is over (monotonic); 0 for never.
        limit_ns: until when nothing has to be looked at.
    """

    __slots__ = (
        *("began_ns", "deadline_ns", "first_slot", "handle", "head", "limit_ns", "request_id", "states"),
        *("target", "waiter"),
    )

    def __init__(self, handle: int, waiter: Waiter, target: Target, graph: Graph, request: Request) -> None:
        self.handle = handle
        self.waiter = waiter
        self.target = target
        self.states = GraphWalk(graph)
        # Not the request: a body that came in memory must not stay there as long.
        self.request_id, self.head = request.request_id, request.head
        self.first_slot = -1
        self.began_ns = request.arrival_ns
        limit_ms = _deadline_ms(request.head)
        if graph.timeout_ms:
            limit_ms = min(limit_ms or graph.timeout_ms, graph.timeout_ms)
        self.deadline_ns = self.began_ns + limit_ms * 1_000_000 if limit_ms else 0
        self.limit_ns = 0

    def lateness(self) -> RequestTimeout:
        """The error of a request whose deadline has passed."""
        limit_ms = self.states.graph.timeout_ms
        if limit_ms and self.deadline_ns - self.began_ns == limit_ms * 1_000_000:
            return RequestTimeout(f"The workflow was not finished in its timeout-ms of {limit_ms}")
        return RequestTimeout("The workflow was not finished in the time that the client gave")

    def took_ns(self) -> list[int]:
        """How long each node was under way; of a list's elements the longest."""
        took = [0] * len(self.states.graph.nodes)
        for task in self.states.tasks():
            took[task.node] = max(took[task.node], task.took_ns)
        return took

    def timings(self, took_ns: Sequence[int]) -> str:
        """The value of the header Server-Timing: the milliseconds of each node that has run (of many, the first)."""
        graph = self.states.graph
        names = graph.timing_names
        if all(took_ns):
            return graph.timings_of_all % tuple([each / 1e6 for each in took_ns[: len(names)]])
        return timing_value([(name, each / 1e6) for name, each in zip(names, took_ns, strict=False) if each])


def _deadline_ms(head: bytes) -> int:
    """How long the client waits, 0 where it does not say."""
    if DEADLINE_HEADER not in head.lower():
        return 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == DEADLINE_HEADER and value.strip().isdigit():
            return min(int(value.strip()[:12]), 1 << 40)
    return 0
