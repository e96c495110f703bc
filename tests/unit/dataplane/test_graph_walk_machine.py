"""The walk of a graph among answers, errors, time-outs, refusals and hang-ups in any order.

The machine plays the owner of the segment and the model workers: a slot is an object, a worker that has a request may
read the slots it refers to until it answers. Numbers in the names are those of the rules in batcher/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wsgi_ts.dataplane.graph import DEFAULT, FAIL, SKIP, Graph, Node
from wsgi_ts.dataplane.graph_walk import GraphWalk
from wsgi_ts.dataplane.task import Action, Fail, Finish, Release, State, Submit, Task, Withdraw

ANY = st.integers(0, 1 << 16)


def node(name: str, *parents: int, **options: object) -> Node:
    """A node with one more attempt, unless the options say otherwise."""
    return Node(name, f"w__{name}", parents=parents, **{"retries": 1, **options})  # type: ignore[arg-type]


GRAPHS = {
    "one": (node("a"),),
    "chain": (node("a"), node("b", 0), node("c", 1, retries=0), node("d", 2)),
    "diamond": (node("a"), node("b", 0), node("c", 0), node("d", 1, 2)),
    "two ends": (node("a"), node("b", 0), node("c", 0)),
    "branches": (node("a"), node("b", 0, on_error=SKIP), node("c", 1), node("d", 0, when="g"), node("e", 2, 3)),
    "defaults": (node("a", on_error=DEFAULT, default="x"), node("b", 0, on_error=DEFAULT, default="y"), node("c", 1)),
    "early end": (node("a"), node("b", 0, when="g"), node("c", 1), node("d", 0, when="g")),
    "request": (node("a"), node("b", 0), node("c", 1, reads_request=True), node("d", 2, reads_request=True)),
    "elements": (
        node("a", scatters=True, on_error=SKIP),
        node("b", 0, scatter=0, on_error=SKIP),
        node("c", 1, scatter=0, reads_request=True),
        node("d", 2, gathers=True),
        node("e", 3),
    ),
    "elements behind": (
        node("a"),
        node("b", 0, scatters=True),
        node("c", 1, scatter=1, when="g"),
        node("d", 2, gathers=True, on_error=SKIP),
        node("e", 0),
        node("f", 3, 4),
    ),
}


@dataclass(eq=False)
class Slot:
    """A slot while it is one task's."""

    task: Task
    reads: list[Slot] = field(default_factory=list)
    is_submitted: bool = False
    is_cancelled: bool = False
    has_answer: bool = False
    is_free: bool = False


class WalkMachine(RuleBasedStateMachine):
    """One walk after the other."""

    @initialize(name=st.sampled_from(sorted(GRAPHS)))
    def start(self, name: str) -> None:
        self.begin(name)

    def begin(self, name: str) -> None:
        self.graph = Graph(name, GRAPHS[name])
        self.walk = GraphWalk(self.graph)
        self.slots: list[Slot] = []
        self.slot_of: dict[Task, Slot] = {}
        self.refuses = False
        self.has_client = True
        self.outcome: Action | None = None
        self.is_readable, self.has_passed_on = True, False
        self.walk.decided = []
        self.runs: dict[tuple[Task, bool], int] = {}
        self.submit(self.walk.begin())

    # -- what the owner does

    def act(self, actions: list[Action]) -> None:
        to_do = list(actions)
        while to_do:
            action = to_do.pop(0)
            if isinstance(action, Submit):
                if self.walk.is_over or self.refuses:
                    to_do += self.walk.refused(action.task)
                else:
                    self.submit(action.task)
            elif isinstance(action, Withdraw):
                slot = self.slot_of.get(action.task)
                if slot is not None:
                    assert slot.is_submitted
                    slot.is_cancelled = True
            elif isinstance(action, Release):
                self.release(action.task)
            else:
                assert self.outcome is None and self.has_client, "a request is answered once"
                self.outcome = action
                if isinstance(action, Finish):
                    for task in action.tasks:
                        assert task.has_answer
                        assert task.state == State.DEFAULT or task in self.slot_of, "the answer was released"

    def submit(self, task: Task) -> None:
        again = self.slot_of.get(task)
        assert again is None or not again.is_submitted, "rule 16: two attempts at a time"
        slot = again or Slot(task)
        if again is None:
            self.slots.append(slot)
            self.slot_of[task] = slot
            for key, source in self.walk.sources(task):
                assert source.state >= State.DONE, f"{key} is not decided"
                if source.state == State.DONE:
                    slot.reads.append(self.slot_of[source])
            if self.graph.nodes[task.node].reads_request:
                start = next(each for each in self.slots if each.task.node == self.graph.start)
                slot.reads.append(start)
        assert not any(read.is_free for read in slot.reads), "rule 15: refers to what was released"
        slot.is_submitted, slot.is_cancelled, slot.has_answer = True, False, False
        run = task, task.is_gate
        self.runs[run] = self.runs.get(run, 0) + 1
        assert self.runs[run] <= self.graph.nodes[task.node].retries + 1, "more attempts than there are"

    def release(self, task: Task) -> None:
        slot = self.slot_of.pop(task, None)
        if slot is None:
            return
        assert not slot.is_submitted, "rule 4: released while a worker may write to it"
        assert not any(each.is_submitted and slot in each.reads for each in self.slots), "rule 15: still read"
        slot.is_free = True

    @property
    def under_way(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.is_submitted]

    def pick(self, which: int) -> Slot:
        return self.under_way[which % len(self.under_way)]

    # -- what may happen

    @precondition(lambda self: self.under_way)
    @rule(which=ANY, passed=st.booleans(), items=st.integers(0, 3))
    def answers(self, which: int, passed: bool, items: int) -> None:
        slot = self.pick(which)
        slot.is_submitted, slot.has_answer = False, True
        self.act(self.walk.answered(slot.task, passed=passed, items=items))

    @precondition(lambda self: self.under_way)
    @rule(which=ANY, may_retry=st.booleans())
    def fails(self, which: int, may_retry: bool) -> None:
        slot = self.pick(which)
        slot.is_submitted = False
        self.act(self.walk.failed(slot.task, may_retry=may_retry))

    @precondition(lambda self: any(slot.task.node == self.graph.start for slot in self.under_way))
    @rule()
    def cannot_be_read(self) -> None:
        slot = next(slot for slot in self.under_way if slot.task.node == self.graph.start)
        slot.is_submitted = False
        is_late = self.walk.is_over or slot.task.state not in (State.RUNNING, State.WITHDRAWN)
        self.is_readable = is_late
        self.act(self.walk.unreadable(slot.task))
        assert is_late or isinstance(self.outcome, Fail), "whatever the node's options say"

    @precondition(lambda self: self.under_way)
    @rule(which=ANY)
    def times_out(self, which: int) -> None:
        self.act(self.walk.timed_out(self.pick(which).task))

    @rule(refuses=st.booleans())
    def has_room(self, refuses: bool) -> None:
        self.refuses = refuses

    @precondition(lambda self: self.outcome is None and self.has_client)
    @rule()
    def client_leaves(self) -> None:
        self.has_client = False
        self.act(self.walk.stop())

    @precondition(lambda self: any(self.walk.is_last(slot.task) for slot in self.under_way))
    @rule()
    def last_one_streams(self) -> None:
        slot = next(slot for slot in self.under_way if self.walk.is_last(slot.task))
        slot.is_submitted, self.has_passed_on = False, True  # its worker has read everything before the first chunk
        self.act(self.walk.passed_on(slot.task))
        self.outcome = Finish([slot.task])

    @precondition(lambda self: not self.under_way)
    @rule(name=st.sampled_from(sorted(GRAPHS)))
    def next_walk(self, name: str) -> None:
        self.begin(name)

    # -- what always holds

    @invariant()
    def open_tasks_are_those_submitted(self) -> None:
        if hasattr(self, "walk"):
            assert self.walk.open == len(self.under_way)

    @invariant()
    def nothing_hangs(self) -> None:
        """With nothing under way the request is answered, and only the slots of the answer are held."""
        if not hasattr(self, "walk") or self.under_way:
            return
        assert self.walk.is_over
        assert not self.has_client or self.outcome is not None
        kept = self.outcome.tasks if isinstance(self.outcome, Finish) else []
        assert {task for task, _ in self.slot_of.items()} <= {task for task in kept if task.is_kept}

    @invariant()
    def each_end_is_told_once(self) -> None:
        if hasattr(self, "walk") and self.walk.decided is not None:
            told = self.walk.decided
            assert len(told) == len(set(map(id, told)))
            assert all(task.state >= State.DONE for task in told)
            if not isinstance(self.outcome, Finish) or self.has_passed_on:
                return
            assert {id(task) for task in told} == {id(task) for task in self.walk.tasks()}

    @invariant()
    def what_is_read_is_held(self) -> None:
        if hasattr(self, "walk"):
            assert not any(read.is_free for slot in self.under_way for read in slot.reads)

    @invariant()
    def a_failure_is_one(self) -> None:
        if hasattr(self, "walk") and isinstance(self.outcome, Fail) and self.is_readable:
            assert self.graph.nodes[self.outcome.task.node].on_error == FAIL


TestWalkMachine = WalkMachine.TestCase
TestWalkMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
