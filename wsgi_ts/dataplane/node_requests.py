"""The references in a node's request: where the answers of its parents lie, and what the client has sent."""

from __future__ import annotations

from wsgi_ts.batcher.shm.body_codec import pack_reference
from wsgi_ts.batcher.shm.layout import ReferenceKind
from wsgi_ts.dataplane.graph import REQUEST, Graph
from wsgi_ts.dataplane.graph_walk import GraphWalk
from wsgi_ts.dataplane.task import State, Task


def references(walk: GraphWalk, task: Task, first_slot: int) -> bytes:
    """Returns the body of a task's request.

    The task's parents are decided; the client's request lies in `first_slot`.
    """
    graph = walk.graph
    node = graph.nodes[task.node]
    inputs = graph.inputs[task.node]
    reads = task.reads
    if len(inputs) == 1 and reads is not None and len(reads) == 1 and not node.gathers:
        return _value(graph, inputs[0][0], reads[0], task.item)  # it runs, so the one that it reads has an answer
    sources = walk.sources(task)
    if node.gathers:
        parts = [_element(graph, key, source) for key, source in sources]
        parts = parts or [pack_reference(graph.inputs[task.node][0][0], ReferenceKind.NO_ELEMENTS)]
    else:
        parts = [_value(graph, key, source, task.item) for key, source in sources if source.has_answer]
    if node.reads_request:
        parts.append(pack_reference(REQUEST, ReferenceKind.REQUEST, first_slot))
    return b"".join(parts)


def inline_answer(graph: Graph, task: Task) -> bytes | None:
    """Returns a task's answer where it lies in no slot; else None."""
    if task.state == State.DEFAULT:
        return graph.nodes[task.node].default.encode()
    return task.value


def _value(graph: Graph, key: str, source: Task, item: int) -> bytes:
    """The reference to a node's answer."""
    inline = inline_answer(graph, source)
    if source.parts is not None and item >= 0:
        part = source.parts[item]
        if not isinstance(part, bytes):
            return pack_reference(key, ReferenceKind.VALUE, *part)
        inline = part
    if inline is not None:
        return pack_reference(key, ReferenceKind.INLINE, inline=inline)
    return pack_reference(key, ReferenceKind.VALUE, *source.place)


def _element(graph: Graph, key: str, source: Task) -> bytes:
    """The reference to the answer for one element of a list."""
    if not source.has_answer:
        return pack_reference(key, ReferenceKind.NO_ELEMENT)
    inline = inline_answer(graph, source)
    if inline is not None:
        return pack_reference(key, ReferenceKind.INLINE_ELEMENT, inline=inline)
    return pack_reference(key, ReferenceKind.ELEMENT, *source.place)
