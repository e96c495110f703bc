"""One request's way through the graph of a workflow: which nodes run, when, and how long their slots are needed.

Pure: it is told what has happened and returns what is to be done, without clock, system call or shared memory
(batcher/README.md, rules 14 to 17). `walks.Walks` tells it, and carries out what it returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from wsgi_ts.dataplane.graph import DEFAULT, SKIP, Graph
from wsgi_ts.dataplane.task import Action, Fail, Finish, Release, State, Submit, Task, Withdraw

#: Elements of a scattered list that are under way at a time: they must not fill the queue of the next model.
MOST_ELEMENTS = 32


class GraphWalk:
    """The walk of one request.

    Attributes:
        is_over: the request is answered, or nobody waits for it: nothing more is begun.
        open: how many tasks are open.
        decided: where somebody wants to know, the tasks that have ended since it was emptied.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.is_over = False
        self.open = 0
        self.decided: list[Task] | None = None
        #: Of nodes that run once by their place; None for the others, whose tasks are found by place and element.
        self._once: list[Task | None] = []
        self._each: dict[tuple[int, int], Task] = {}
        self._undecided = 0
        self._answered: set[int] = set()  # nodes that run once and have an answer
        self._elements: dict[int, deque[int]] = {}
        self._to_skip: list[Task] = []
        self._actions: list[Action] = []
        for place, (awaited, readers) in enumerate(graph.counts):
            if awaited < 0:
                self._once.append(None)
            else:
                self._once.append(Task(place, -1, awaited, readers))
                self._undecided += 1

    def begin(self) -> Task:
        """Starts with the node that reads the client's request; its first attempt is to be submitted at once."""
        start = self._task(self.graph.start)
        self._launch(start)
        self._actions.clear()
        return start

    def tasks(self) -> Iterable[Task]:
        """All tasks there are."""
        once = [task for task in self._once if task is not None]
        return [*once, *self._each.values()] if self._each else once

    def _task(self, place: int, item: int = -1) -> Task:
        """A node's task, or the one for an element."""
        task = self._once[place] if item < 0 else self._each[place, item]
        if task is None:
            raise LookupError(f"node {place} runs for elements")
        return task

    def is_last(self, task: Task) -> bool:
        """Whether the task's answer is the whole answer, and nothing else is left to do."""
        return self._undecided == 1 and self.graph.ends == (task.node,) and not task.is_gate and not self.is_over

    def answered(self, task: Task, *, passed: bool = True, items: int = 0) -> list[Action]:
        """Its request is answered.

        `passed` is what a gate has said, `items` how many elements the answer of a node that scatters has.
        """
        if self._is_late(task):
            return self._taken()
        if not task.is_gate:
            task.items = items
            self._close(task)
            self._decide(task, State.DONE)
        elif passed:
            task.is_gate = False
            task.state, task.attempt = State.RUNNING, 1
            self._actions += (Release(task), Submit(task))
        else:
            self._close(task)
            self._decide(task, State.SKIPPED)
        return self._taken()

    def failed(self, task: Task, *, may_retry: bool = True) -> list[Action]:
        """Its request is answered with an error.

        Without `may_retry` another attempt is of no use: no worker, or a full queue.
        """
        if self._is_late(task):
            return self._taken()
        if may_retry and task.state == State.WITHDRAWN:
            task.state = State.RUNNING
            self._actions.append(Submit(task))
        elif may_retry and task.attempt <= self.graph.nodes[task.node].retries:
            task.attempt += 1
            self._actions.append(Submit(task))
        else:
            self._close(task)
            self._give_up(task)
        return self._taken()

    def unreadable(self, task: Task) -> list[Action]:
        """The client's request is none that the first node could be given: no attempt, and no option, is of use."""
        if not self._is_late(task):
            self._close(task)
            self._fail(task)
        return self._taken()

    def refused(self, task: Task) -> list[Action]:
        """What `Submit` asks for cannot be done; nothing was submitted."""
        self._close(task)
        if self.is_over:
            self._let_go(task)
        else:
            self._give_up(task)
        return self._taken()

    def timed_out(self, task: Task) -> list[Action]:
        """The time of its attempt is over; no news where no attempt is under way."""
        if task.state not in (State.RUNNING, State.WITHDRAWN) or self.is_over:
            return []
        if task.state == State.RUNNING:
            self._actions.append(Withdraw(task))
        if task.attempt <= self.graph.nodes[task.node].retries:
            task.attempt += 1
            task.state = State.WITHDRAWN
        else:
            self._give_up(task)
        return self._taken()

    def passed_on(self, task: Task) -> list[Action]:
        """The last task's answer is streamed to the client: its slot is left to whoever does that."""
        task.is_kept = True
        self._close(task)
        self._decide(task, State.DONE)
        if self.decided is not None:
            self.decided.clear()  # it goes on
        self._actions = [action for action in self._actions if not isinstance(action, Finish)]
        return self._taken()

    def stop(self) -> list[Action]:
        """Nobody waits for the answer any more."""
        self._stop()
        return self._taken()

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _is_late(self, task: Task) -> bool:
        """Closes a task that is decided, or whose walk is over: its request is answered too late."""
        if not self.is_over and task.state in (State.RUNNING, State.WITHDRAWN):
            return False
        self._close(task)
        self._let_go(task)
        return True

    def _launch(self, task: Task) -> None:
        """Has a task run whose parents are decided."""
        task.state, task.attempt = State.RUNNING, 1
        task.is_open = True
        task.is_gate = bool(self.graph.nodes[task.node].when)
        self.open += 1
        for source in self._sources(task):
            source.refs += 1
        self._actions.append(Submit(task))

    def _close(self, task: Task) -> None:
        """Nothing reads what its request refers to any more."""
        if not task.is_open:
            return
        task.is_open = False
        self.open -= 1
        for source in self._sources(task):
            source.refs -= 1
            self._let_go(source)

    def _give_up(self, task: Task) -> None:
        """All attempts have failed."""
        on_error = self.graph.nodes[task.node].on_error
        if on_error == SKIP:
            self._decide(task, State.SKIPPED)
        elif on_error == DEFAULT:
            self._decide(task, State.DEFAULT)
        else:
            self._fail(task)

    def _fail(self, task: Task) -> None:
        """The request fails with this task."""
        task.state = State.FAILED
        if self.decided is not None:
            self.decided.append(task)
        self._actions.append(Fail(task))
        self._stop()
        self._let_go(task)

    def _decide(self, task: Task, state: int) -> None:
        """Notes how a task has ended, and goes on with all that follows from it: no call in a call for each of these.

        A chain may be longer than calls may be nested.
        """
        self._note_end(task, state)
        while self._to_skip:
            self._note_end(self._to_skip.pop(), State.SKIPPED)
        if not self._undecided and not self.is_over:
            self._finish()

    def _note_end(self, task: Task, state: int) -> None:
        """Notes how a task has ended, and tells those that read it."""
        task.state = state
        if self.decided is not None:
            self.decided.append(task)
        self._undecided -= 1
        graph = self.graph
        if task.has_answer and task.item < 0:
            self._answered.add(task.node)
        for source in self._sources(task):
            source.undecided -= 1
            self._let_go(source)
        if graph.nodes[task.node].scatters:
            self._scatter(task)
        else:
            for child in graph.children[task.node]:
                self._tell(self._task(child, -1 if graph.nodes[child].gathers else task.item), task)
        self._let_go(task)

    def _tell(self, child: Task, parent: Task) -> None:
        """Tells a task that one of its parents is decided."""
        child.awaited -= 1
        child.has_input = child.has_input or parent.has_answer or self.graph.nodes[child.node].gathers
        if not child.awaited and not self.is_over:
            if child.has_input:
                self._launch(child)
            else:
                self._to_skip.append(child)
        if self.graph.nodes[child.node].gathers:
            self._begin_element(self.graph.nodes[parent.node].scatter)

    def _scatter(self, task: Task) -> None:
        """Makes the tasks of all elements, and begins with the first ones."""
        graph, region = self.graph, self.graph.region[task.node]
        (gather,) = {child for inner in region for child in graph.children[inner] if graph.nodes[child].gathers}
        count = task.items if task.state == State.DONE else 0
        for item in range(count):
            for inner in region:
                node = graph.nodes[inner]
                self._each[inner, item] = Task(inner, item, len(node.parents), len(graph.readers[inner]))
        self._undecided += count * len(region)
        # What may still refer to it: each element's first nodes, in place of the nodes themselves.
        task.undecided += (count - 1) * len([child for child in graph.children[task.node] if child in region])
        asking = [inner for inner in region if graph.nodes[inner].reads_request]
        self._task(graph.start).undecided += (count - 1) * len(asking)
        self._elements[task.node] = deque(range(count))
        if count:
            self._task(gather).awaited = count
            for _ in range(min(count, MOST_ELEMENTS)):
                self._begin_element(task.node)
        elif task.state == State.DONE:
            self._launch(self._task(gather))
        else:
            self._to_skip.append(self._task(gather))

    def _begin_element(self, scatter: int) -> None:
        """Begins the next element of a list, if there is one."""
        waiting = self._elements[scatter]
        if waiting and not self.is_over:
            item = waiting.popleft()
            for child in self.graph.children[scatter]:
                self._tell(self._task(child, item), self._task(scatter))

    def sources(self, task: Task) -> list[tuple[str, Task]]:
        """The tasks whose answers a task's request refers to, with their keys of the row; not the client's request."""
        graph = self.graph
        node = graph.nodes[task.node]
        if node.gathers:
            (parent,) = node.parents
            count = self._task(graph.nodes[parent].scatter).items
            return [(graph.inputs[task.node][0][0], self._task(parent, item)) for item in range(count)]
        return [
            (key, self._task(parent, task.item if graph.nodes[parent].scatter >= 0 else -1))
            for key, parent in graph.inputs[task.node]
        ]

    def _sources(self, task: Task) -> list[Task]:
        found = task.reads
        if found is None:
            found = [source for _, source in self.sources(task)]
            if self.graph.nodes[task.node].reads_request:
                found.append(self._task(self.graph.start))
            task.reads = found
        return found

    def _let_go(self, task: Task) -> None:
        """Releases a slot that nobody needs any more (rule 15)."""
        if task.is_open or task.refs or task.is_kept:
            return
        if self.is_over or (task.state > State.WITHDRAWN and not task.undecided and not self._may_be_end(task)):
            self._actions.append(Release(task))

    def _may_be_end(self, task: Task) -> bool:
        """Whether its answer may be the workflow's: it has one, and none that comes after it does."""
        place = task.node
        if place not in self._answered or task.item >= 0 or self.graph.nodes[place].scatters:
            return False
        return self.graph.behind[place].isdisjoint(self._answered)

    def _finish(self) -> None:
        """All tasks are decided: the answer is that of the last ones that have one."""
        ends = [task for task in self.tasks() if self._may_be_end(task)]
        for end in ends:
            end.is_kept = True
        self._actions.append(Finish(ends))
        self._stop()

    def _stop(self) -> None:
        self.is_over = True
        for task in self.tasks():
            if task.is_open:
                if task.state == State.RUNNING:
                    self._actions.append(Withdraw(task))
            else:
                self._let_go(task)
