"""The longest time of a request: no walk takes longer, and one whose nodes take all their time takes as long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from wsgi_ts.dataplane.graph import Graph
from wsgi_ts.dataplane.graph_walk import MOST_ELEMENTS, GraphWalk
from wsgi_ts.dataplane.task import Action, Fail, Finish, State, Submit, Task
from wsgi_ts.workflows.compile import compile_workflow
from wsgi_ts.workflows.longest import longest
from wsgi_ts.workflows.spec import parse_spec

#: The path that is slowest, its milliseconds, and what a further round of elements adds, by the specification.
CHAIN = "{retry-attempts: 3, timeout-ms: 5000, m: {url: m.mar, retry-attempts: 0, timeout-ms: 700}}"
GRAPHS = {
    "chain": (f"models: {CHAIN}\ndag: {{a: [m], m: [b]}}", 40_700, ("a", "m", "b"), {}),
    "branches": (
        "models: {retry-attempts: 0, timeout-ms: 100, slow: {url: m.mar, timeout-ms: 250}}\n"
        "dag: {a: [slow, b], b: [c], c: [d, e], slow: [d]}\n",
        450,
        ("a", "slow", "d"),
        {},
    ),
    "other branch": (
        "models: {retry-attempts: 0, timeout-ms: 100, slow: {url: m.mar, timeout-ms: 150}}\n"
        "dag: {a: [slow, b], b: [c], c: [d, e], slow: [d]}\n",
        400,
        ("a", "b", "c", "d"),
        {},
    ),
    "condition": (
        "models: {retry-attempts: 1, timeout-ms: 100}\ndag: {a: [b], b: [c]}\n"
        "options: {nodes: {b: {when: f}, c: {on-error: skip}}}",
        800,
        ("a", "b", "c"),
        {},
    ),
    "list": (
        "models: {retry-attempts: 1, timeout-ms: 100}\ndag: {a: [s], s: [b], b: [c], c: [g], g: [end]}\n"
        "options: {nodes: {s: {scatter: true}, b: {when: f}, c: {on-error: skip}, g: {gather: true}}}",
        1400,
        ("a", "s", "b", "c", "g", "end"),
        {"s": 600},
    ),
}

#: What becomes of an attempt: "answers", "fails" or "hangs", and after which part of its time.
Outcome = tuple[str, float]


@dataclass
class Clockwork:
    """A walk whose attempts end as `outcome` says, in simulated milliseconds."""

    graph: Graph
    items: int
    outcome: Callable[[Task], Outcome]
    now: float = 0.0
    limits: dict[Task, float] = field(default_factory=dict)
    due: dict[Task, tuple[float, str]] = field(default_factory=dict)

    def took(self) -> float:
        """How long the request takes until it is answered."""
        walk = GraphWalk(self.graph)
        self.begin(walk.begin())
        while self.due:
            task = min(self.due, key=lambda each: self.due[each][0])
            self.now, what = self.due.pop(task)
            was_withdrawn = task.state == State.WITHDRAWN
            if what == "hangs":
                actions = walk.timed_out(task)
                if task.state == State.WITHDRAWN:
                    self.begin(task)
            elif what == "fails":
                actions = walk.failed(task)
            else:
                scatters = self.graph.nodes[task.node].scatters and not task.is_gate
                actions = walk.answered(task, items=self.items if scatters else 0)
            if self.act(actions, went_on=was_withdrawn and what == "fails"):
                return self.now
        raise AssertionError("nothing is under way, and nobody has answered")

    def act(self, actions: list[Action], *, went_on: bool) -> bool:
        """Submits what is to be; returns whether the request is answered."""
        for action in actions:
            if isinstance(action, Finish | Fail):
                return True
            if isinstance(action, Submit):
                self.begin(action.task, is_new=not went_on)
        return False

    def begin(self, task: Task, *, is_new: bool = True) -> None:
        if is_new:
            self.limits[task] = self.now + self.graph.nodes[task.node].timeout_ms
        what, part = self.outcome(task)
        left = self.limits[task] - self.now
        self.due[task] = (self.limits[task] if what == "hangs" else self.now + part * left, what)


def graph_of(name: str) -> Graph:
    return compile_workflow("w", parse_spec(GRAPHS[name][0])).graph


@pytest.mark.parametrize("name", GRAPHS)
def test_the_slowest_path(name: str) -> None:
    _, ms, path, more_ms = GRAPHS[name]
    found = longest(graph_of(name))
    assert (found.ms, found.path, found.more_ms, found.is_limit) == (ms, path, more_ms, False)


@pytest.mark.parametrize("items", [1, MOST_ELEMENTS, MOST_ELEMENTS + 1, 3 * MOST_ELEMENTS])
@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_that_take_all_their_time_take_the_longest(name: str, items: int) -> None:
    graph = graph_of(name)

    def at_the_last_moment(task: Task) -> Outcome:
        return ("answers", 1.0) if task.attempt > graph.nodes[task.node].retries else ("hangs", 1.0)

    rounds = -(-items // MOST_ELEMENTS) - 1
    found = longest(graph)
    assert Clockwork(graph, items, at_the_last_moment).took() == found.ms + rounds * sum(found.more_ms.values())


@given(name=st.sampled_from(sorted(GRAPHS)), items=st.integers(0, 80), data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_walk_takes_longer(name: str, items: int, data: st.DataObject) -> None:
    chance = data.draw(st.randoms(use_true_random=False))

    def any_outcome(task: Task) -> Outcome:
        return chance.choice(("answers", "fails", "hangs")), chance.choice((0.0, 0.5, 1.0))

    found = longest(graph_of(name))
    rounds = max(0, -(-items // MOST_ELEMENTS) - 1)
    # A microsecond for the sums of fractions.
    most = found.ms + rounds * sum(found.more_ms.values()) + 0.001
    assert Clockwork(graph_of(name), items, any_outcome).took() <= most


@pytest.mark.parametrize(
    ("name", "limit", "ms", "is_limit"),
    [("chain", 500, 500, True), ("chain", 40_700, 40_700, False), ("list", 5000, 5000, True)],
)
def test_the_limit_of_the_workflow(name: str, limit: int, ms: int, is_limit: bool) -> None:
    graph = Graph("w", graph_of(name).nodes, timeout_ms=limit)
    assert Graph.from_json("w", graph.to_json()).timeout_ms == limit
    found = longest(graph)
    assert (found.ms, found.is_limit) == (ms, is_limit)


def test_it_is_told_in_words() -> None:
    assert str(longest(graph_of("list"))) == (
        "a request is answered within 1.4 s, all attempts of a, s, b, c, g, end; "
        "0.6 s more for each further 32 elements of s"
    )
    limited = Graph("w", graph_of("list").nodes, timeout_ms=1500)
    assert str(longest(limited)) == "a request is answered within 1.5 s: timeout-ms of the options"
