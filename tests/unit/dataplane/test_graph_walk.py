"""The walk of a graph where a special graph says more than any sequence of events."""

from __future__ import annotations

from wsgi_ts.dataplane.graph import Graph, Node
from wsgi_ts.dataplane.graph_walk import GraphWalk
from wsgi_ts.dataplane.task import Finish, State


def test_a_chain_that_is_longer_than_calls_may_be_nested_is_skipped_at_once() -> None:
    length = 1000
    nodes = [Node("n0", "n0"), Node("n1", "n1", parents=(0,), when="gate")]
    nodes += [Node(f"n{place}", f"n{place}", parents=(place - 1,)) for place in range(2, length)]
    walk = GraphWalk(Graph("w", tuple(nodes)))
    (submitted,) = walk.answered(walk.begin())
    actions = walk.answered(submitted.task, passed=False)  # type: ignore[union-attr]
    (finish,) = [action for action in actions if isinstance(action, Finish)]
    assert [task.node for task in finish.tasks] == [0]
    assert [task.state for task in walk.tasks()] == [State.DONE] + [State.SKIPPED] * (length - 1)


def test_the_times_of_many_nodes_leave_room_for_the_rest_of_an_answer_s_head() -> None:
    nodes = [Node(f"{place:0100}", "m", parents=(place - 1,) if place else ()) for place in range(200)]
    graph = Graph("w", tuple(nodes))
    longest = graph.timings_of_all % tuple([86_400_000.0] * len(graph.timing_names))
    assert len(longest) <= 2500
    assert graph.timing_names == [node.name for node in nodes[: 2500 // 119]]
    assert len(Graph("w", tuple(nodes[:5])).timing_names) == 5
