"""Walks over a real segment: model workers read what belongs to their request, and all slots are given back.

The worker's side is played here with the worker's own code: it reads rows out of slots, and writes answers into them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.client import SlotClient
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.layout import RequestFlag, SegmentLayout, SlotState
from wsgi_ts.batcher.shm.request_codec import Answer, Request, write_answer
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.batcher.worker.slots import SlotReference, WorkerSlots
from wsgi_ts.dataplane.attempts import Attempts
from wsgi_ts.dataplane.graph import DEFAULT, SKIP, Graph, Node
from wsgi_ts.dataplane.retry_after import RetryAfter
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.dataplane.walk_counters import WalkCounters
from wsgi_ts.dataplane.walks import Walks

SLOTS = 32
HEAD = b"POST /wfpredict/w HTTP/1.1\r\nhost: a\r\n\r\n"


def node(name: str, *parents: int, **options: Any) -> Node:
    return Node(name, name, parents=parents, **options)


GRAPHS = {
    "chain": (node("a"), node("b", 0), node("c", 1)),
    "diamond": (node("a"), node("b", 0, on_error=SKIP), node("c", 0, on_error=DEFAULT, default="-"), node("d", 1, 2)),
    "request": (node("a"), node("b", 0, when="gate"), node("c", 0), node("d", 1, 2, reads_request=True)),
    "list": (
        node("a", scatters=True, is_function=True),
        node("b", 0, scatter=0, on_error=SKIP),
        node("c", 1, scatter=0),
        node("d", 2, gathers=True, reads_request=True),
    ),
}


class Place:
    """A segment with its owner's walks, and the model workers' view of it."""

    def __init__(self, prefix: str) -> None:
        self.board = Board.create(prefix)
        Doorbell.create(batcher_bell_name(prefix, 0))
        self.segment = Segment.create(prefix, 1, SegmentLayout(SLOTS, 1, 100_000, 100_000))
        self.client = SlotClient(self.segment, self.board, 1, warm_bytes=1 << 20)
        self.waiting: dict[int, Any] = {}
        self.delivered: dict[str, Answer] = {}
        counters, retry_after = WalkCounters(self.board, 1), RetryAfter(self.board)
        attempts: Attempts[str] = Attempts(
            self.client, self.target, self.waiting, lambda target: 0, counters, retry_after
        )
        self.walks = Walks(attempts, 1 << 20)
        self.walks.deliver = self.delivered.__setitem__
        self.worker = WorkerSlots(prefix, decode_input_request=True)

    @staticmethod
    def target(name: str, version: str | None) -> Target:
        # The node's name stands where a function's would: so the other side knows what it is asked.
        return Target(name, None, 1, (0,), name.encode(), RequestFlag.REFERENCES | RequestFlag.FUNCTION)

    def begin(self, waiter: str, graph: Graph, body: bytes) -> int | None:
        target = Target("w", None, 1, (0,), b"a", RequestFlag.FUNCTION, graph=graph)
        slot = self.client.take(1)
        if slot is None:
            return None
        request = Request(target, "0" * 36, HEAD, b"", body, len(body), 0)
        return self.walks.begin(slot, waiter, target, graph, request)

    def submitted(self) -> list[int]:
        return [slot for slot in range(SLOTS) if self.client.state(slot) == SlotState.READY]

    def answer(self, slot: int, body: bytes | None) -> None:
        """A model worker has answered; None: its handler has failed."""
        if body is None:
            self.segment.fail(slot, 500, "no")
        else:
            write_answer(self.segment, slot, (0, 0), 200, "", [], body)
            self.segment.states[slot] = self.segment.states[slot] & ~0xFF | SlotState.DONE
        landed = self.walks.take_news(slot)
        if landed is not None:
            at, waiter = landed
            answer = self.walks.answer(at, self.client.answer(at))
            answer.body = bytes(answer.body)
            self.delivered[waiter] = answer
            del self.waiting[at]
            self.client.release(at)
        self.client.publish()


@contextmanager
def fresh_place() -> Iterator[Place]:
    prefix = f"wsgi-ts-{uuid.uuid4().hex}"
    try:
        yield Place(prefix)
    finally:
        unlink_prefix(prefix)


def marks(row: dict[str, Any]) -> set[bytes]:
    """The first bytes of everything in a row: each is the mark of the request that it belongs to."""
    found = set()
    for value in row.values():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and bytes(each) != b"-":
                found.add(bytes(each)[:8])
    return found


def packed(parts: list[bytes]) -> bytes:
    numbers = [len(parts), *map(len, parts)]
    return b"".join(number.to_bytes(4, "little") for number in numbers) + b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_row_is_its_own_request_s(data: st.DataObject) -> None:
    with fresh_place() as place:
        answer_in_any_order(place, data)


def answer_in_any_order(place: Place, data: st.DataObject) -> None:
    """Model workers answer several walks, fail, and clients leave, until nothing is under way."""
    asked: dict[str, int] = {}
    for number in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.sampled_from(sorted(GRAPHS)))
        mark = b"%08d" % number
        waiter = mark.decode()
        handle = place.begin(waiter, Graph(name, GRAPHS[name]), mark * data.draw(st.sampled_from([1, 400])))
        if handle is not None:
            asked[waiter] = handle
    gone = set()
    while waiting := place.submitted():
        slot = data.draw(st.sampled_from(waiting))
        mark = None
        if place.segment.cancels[slot]:
            place.answer(slot, None)
            continue
        request = place.worker.read(SlotReference(place.segment, slot))
        found = marks(request.row)
        assert len(found) <= 1, f"{request.function} reads of several requests: {found}"
        mark = next(iter(found), b"")
        what = data.draw(st.sampled_from(["answer", "answer", "answer", "fail", "hang up"]))
        if what == "hang up" and asked and not gone:
            waiter = data.draw(st.sampled_from(sorted(asked)))
            gone.add(waiter)
            if waiter not in place.delivered:
                place.walks.leave(asked[waiter])
        if what == "fail":
            place.answer(slot, None)
        elif request.function == "gate":
            place.answer(slot, data.draw(st.sampled_from([b"0", b"1"])))
        elif _scatters(place, slot):
            place.answer(
                slot, packed([mark + b"." * size for size in data.draw(st.lists(st.integers(0, 900), max_size=4))])
            )
        else:
            place.answer(slot, mark + request.function.encode() * data.draw(st.sampled_from([1, 3000])))
    for waiter in asked.keys() - gone:
        answer = place.delivered[waiter]
        # Of a node all of whose parents were skipped or have defaults the answer has no mark.
        mark = bytes(answer.body)[:8]
        assert answer.error is not None or mark == waiter.encode() or not mark.isdigit(), "another's answer"
    assert not place.walks.attempts.steps
    assert not place.waiting
    assert place.client.in_flight == 0
    assert all(word & 0xFF == SlotState.FREE for word in place.segment.states)


def _scatters(place: Place, slot: int) -> bool:
    walk, task = place.walks.attempts.steps[slot]
    return walk.states.graph.nodes[task.node].scatters
