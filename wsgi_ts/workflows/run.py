"""`wsgi-ts workflow run`: sends one request through a workflow, in this process and without a server.

Which nodes run, and what each of them gets, is decided by the code that decides it in the server. A node is loaded when
the request first comes to it, and has one attempt; time-outs do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsgi_ts.dataplane.graph import REQUEST, Graph
from wsgi_ts.dataplane.graph_walk import GraphWalk
from wsgi_ts.dataplane.node_answers import joined, json_parts, packed_parts
from wsgi_ts.dataplane.task import Action, Fail, Finish, State, Submit, Task
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving.inputs import BadInput, LazyHeaders, Request, build_row
from wsgi_ts.workflows.compile import compile_workflow
from wsgi_ts.workflows.local_nodes import LocalNodes, RunError
from wsgi_ts.workflows.source import Source, SourceError, open_source
from wsgi_ts.workflows.spec import WorkflowSpec, parse_spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for a workflow that fails, 2 for wrong flags."""
    options = run_parser().parse_args(arguments)
    level = logging.INFO if options.trace else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=level, force=True)
    try:
        with _answers_alone() as answer_fd:
            body = _read(options.input)
            with open_source(options.workflow, options.handler) as source:
                answer = _run(source, body, options)
            _write(answer_fd, answer)
    except (SourceError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="wsgi-ts workflow run",
        description="Sends one request through a workflow, without a server; its answer goes to standard output.",
    )
    add = parser.add_argument
    add("workflow", type=Path, metavar="WORKFLOW", help="the .war file, its directory unpacked, or the YAML file")
    add("input", nargs="?", default="-", metavar="INPUT", help="the request's body; default: standard input")
    add("--handler", type=Path, metavar="FILE", help="the functions, for a YAML file")
    add("--model-store", type=Path, metavar="DIR", help="where the models are; default: beside the workflow")
    add("--content-type", metavar="TYPE", help="the request's Content-Type; default: none, as bytes")
    add("--header", "-H", action="append", default=[], metavar="NAME:VALUE", help="a header of the request; repeatable")
    add("--trace", action="store_true", help="say on standard error what each node does, and how long it takes")
    return parser


@contextlib.contextmanager
def _answers_alone() -> Iterator[int]:
    """Sends what handlers print to standard error; yields the descriptor of standard output."""
    sys.stdout.flush()
    answer_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        yield answer_fd
    finally:
        sys.stdout.flush()
        os.dup2(answer_fd, sys.stdout.fileno())
        os.close(answer_fd)


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror}") from error


def _write(answer_fd: int, answer: bytes) -> None:
    left = memoryview(answer)
    while left:
        left = left[os.write(answer_fd, left) :]


def _run(source: Source, body: bytes, options: argparse.Namespace) -> bytes:
    try:
        spec = parse_spec(source.spec_text, source.spec_name)
        compiled = compile_workflow(source.name, spec)
    except ServerError as error:
        raise RunError(f"{source.name}: {error.message}") from error
    store = options.model_store or options.workflow.absolute().parent
    head = _request_head(source.name, options.content_type, options.header)
    with tempfile.TemporaryDirectory(prefix="wsgi-ts-workflow-") as scratch:
        nodes = LocalNodes(source, spec, compiled, store, Path(scratch))
        try:
            return LocalRun(spec, compiled.graph, nodes, head, options.content_type, options.trace).answer(body)
        finally:
            nodes.close()


def _request_head(name: str, content_type: str | None, headers: list[str]) -> bytes:
    lines = [f"POST /wfpredict/{name} HTTP/1.1"]
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    for header in headers:
        if ":" not in header or "\r" in header or "\n" in header:
            raise RunError(f"{header!r} is no header: write NAME:VALUE")
        lines.append(header)
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace")


class LocalRun:
    """One request's way through the graph.

    Args:
        head: the request's head.
        content_type: of its body.
        trace: whether to tell of each node.
    """

    def __init__(
        self, spec: WorkflowSpec, graph: Graph, nodes: LocalNodes, head: bytes, content_type: str | None, trace: bool
    ) -> None:
        self._spec = spec
        self._graph = graph
        self._nodes = nodes
        self._head = head
        self._content_type = content_type
        self._trace = trace
        self._walk = GraphWalk(graph)

    def answer(self, body: bytes) -> bytes:
        """Runs the nodes in topological order, those for the items of a list together, and returns the answer.

        Raises:
            RunError: a node has failed, or could not be loaded; or several leaves cannot be put together.
        """
        self._types: dict[str, str] = {}
        try:
            self._first = build_row(self._content_type, memoryview(body), types=self._types)
        except BadInput as error:
            raise RunError(str(error)) from error
        to_do = deque([self._walk.begin()])
        while to_do:
            batch = self._next_batch(to_do)
            for action in self._run_batch(batch):
                if isinstance(action, Submit):
                    to_do.append(action.task)
                elif isinstance(action, Fail):
                    raise RunError(f"Error executing {self._graph.nodes[action.task.node].name}")
                elif isinstance(action, Finish):
                    return self._finish(action.tasks)
        raise RunError("the graph came to no end")

    def _next_batch(self, to_do: deque[Task]) -> list[Task]:
        """The first tasks that one call of a handler can answer."""
        batch = [to_do.popleft()]
        first = batch[0]
        name = self._graph.nodes[first.node].name
        if not first.is_gate and self._nodes.load(name):
            most = self._nodes.batch_size(name)
            while to_do and len(batch) < most and to_do[0].node == first.node and not to_do[0].is_gate:
                batch.append(to_do.popleft())
        return batch

    def _run_batch(self, batch: list[Task]) -> list[Action]:
        node = self._graph.nodes[batch[0].node]
        gate = self._spec.nodes[node.name].options.when if batch[0].is_gate else None
        if not self._nodes.load(node.name, gate):
            return [action for task in batch for action in self._walk.refused(task)]
        began = time.monotonic()
        answers = self._nodes.run(node.name, gate, [self._request(task) for task in batch])
        took_ms = (time.monotonic() - began) * 1000
        if self._trace:
            told = f"when {gate}" if gate else f"{len(batch)} items" if len(batch) > 1 else "ran"
            sizes = ", ".join("failed" if answer is None else f"{len(answer)} bytes" for answer in answers[:4])
            print(f"{node.name}: {told}, {took_ms:.1f} ms, {sizes}", file=sys.stderr)
        return [action for task, answer in zip(batch, answers, strict=True) for action in self._answered(task, answer)]

    def _answered(self, task: Task, answer: bytes | None) -> list[Action]:
        node = self._graph.nodes[task.node]
        if answer is None:
            # Here another attempt would meet the same process, and nobody else in it.
            return self._walk.failed(task, may_retry=False)
        if task.is_gate:
            return self._walk.answered(task, passed=answer not in (b"", b"0"))
        task.value = answer
        if not node.scatters:
            return self._walk.answered(task)
        try:
            task.parts = packed_parts(memoryview(answer), 0, len(answer)) if node.is_function else json_parts(answer)
        except ValueError as error:
            print(f"The answer of {node.name} cannot be scattered: {error}", file=sys.stderr)
            return self._walk.failed(task, may_retry=False)
        return self._walk.answered(task, items=len(task.parts))

    def _request(self, task: Task) -> Request:
        """What the handler gets: the client's request, or what the node's parents have answered."""
        node = self._graph.nodes[task.node]
        if task.node == self._graph.start:
            return Request("1", self._first, LazyHeaders(self._head, {}, self._types))
        row: dict[str, object] = {}
        if node.gathers:
            key = self._graph.inputs[task.node][0][0]
            row[key] = [
                bytearray(self._body(source)) if source.has_answer else None for _, source in self._walk.sources(task)
            ]
        else:
            for key, source in self._walk.sources(task):
                if source.has_answer:
                    row[key] = bytearray(self._body(source, task.item))
        if node.reads_request:
            row |= {f"{REQUEST}.{key}": value for key, value in self._first.items()}
        return Request("1", row, LazyHeaders(self._head, {}, dict.fromkeys(row, "")))

    def _body(self, task: Task, item: int = -1) -> bytes:
        if task.state == State.DEFAULT:
            return self._graph.nodes[task.node].default.encode()
        if task.parts is not None and item >= 0:
            part = task.parts[item]
            return part if isinstance(part, bytes) else (task.value or b"")[part[0] : part[0] + part[1]]
        return task.value or b""

    def _finish(self, ends: list[Task]) -> bytes:
        if len(ends) == 1 and len(self._graph.ends) == 1:
            return self._body(ends[0])
        answer = joined({self._graph.nodes[end.node].name: self._body(end) for end in ends})
        if answer.error is not None:
            raise RunError(f"the leaves cannot be put together, each has to be a JSON object: {answer.error.message}")
        return bytes(answer.body)


if __name__ == "__main__":
    sys.exit(main())
