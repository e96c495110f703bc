"""One node of one request of a workflow: where it is, and what may be done about it."""

from __future__ import annotations

from typing import Final

from wsgi_ts.errors import ServerError


class State:
    """Where a task is; those from DONE on are decided. No enum, as in `layout`: it is looked at for every node."""

    WAITING: Final = 0
    RUNNING: Final = 1
    WITHDRAWN: Final = 2
    DONE: Final = 3
    DEFAULT: Final = 4
    SKIPPED: Final = 5
    FAILED: Final = 6


#: What people are told of each State.
STATE_NAMES: Final = ("waiting", "running", "withdrawn", "done", "default", "skipped", "failed")


class Task:
    """One node of one walk, or, between a scatter and its gather, one node for one element.

    Attributes:
        node: the node's place in the graph.
        item: the element's number; -1 where the node runs once.
        state: its State.
        attempt: which attempt is under way, from 1 on.
        is_gate: the request under way asks whether the node runs.
        is_open: it has a request that is not answered for good.
        awaited: parents that are not decided.
        has_input: whether a parent has an answer.
        refs: open tasks whose requests refer to its slot.
        undecided: tasks that may still come to refer to it.
        items: how many elements its answer has, where it scatters.
        is_kept: its answer is the workflow's, or a part of it.
        reads: those whose slots its request refers to, once that is known.
        slot, limit_ns, began_ns, took_ns, place, value, parts, error: for who carries out the walk: where the request
            lies (-1 for nowhere), until when its attempt may take, since when it is under way and how long it has been,
            offset and length of its answer, an answer that does not lie in the slot, where its elements lie (or they
            themselves), and why it was refused.
        facts: how it was run, as its slot has it (`request_codec.packed_times`).
    """

    # What most tasks never change stands in the class: making tasks is a good part of a small request's cost.
    attempt = 0
    is_gate = False
    is_open = False
    has_input = False
    is_kept = False
    refs = 0
    items = 0
    slot = -1
    limit_ns = 0
    began_ns = 0
    took_ns = 0
    reads: list[Task] | None = None
    value: bytes | None = None
    parts: list[tuple[int, int] | bytes] | None = None
    error: ServerError | None = None
    facts = b""

    def __init__(self, node: int, item: int, awaited: int, undecided: int) -> None:
        self.node = node
        self.item = item
        self.awaited = awaited
        self.undecided = undecided
        self.place = (0, 0)
        self.state: int = State.WAITING

    @property
    def has_answer(self) -> bool:
        """Whether those that read it find something."""
        return State.DONE <= self.state <= State.DEFAULT

    def __repr__(self) -> str:
        return f"<Task {self.node}.{self.item} state {self.state} attempt {self.attempt}>"


class TaskAction:
    """Something to be done about one task."""

    def __init__(self, task: Task) -> None:
        self.task = task


class Submit(TaskAction):
    """Submit the task's next attempt: in its slot, or, where it has none, in a new one."""


class Withdraw(TaskAction):
    """Set the cancel word of the task's slot."""


class Release(TaskAction):
    """Give the task's slot back."""


class Fail(TaskAction):
    """Answer the request with an error: all attempts of this task have failed."""


class Finish:
    """Answer the request with what these tasks have; their slots are left to whoever answers."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks


Action = Submit | Withdraw | Release | Finish | Fail
