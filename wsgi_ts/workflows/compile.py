"""From a workflow's specification to what the data path and the models' manager have to know."""

from __future__ import annotations

import json
from typing import Any

from wsgi_ts.dataplane.graph import DEFAULT, SKIP, Graph, Node
from wsgi_ts.errors import InvalidDag
from wsgi_ts.messages import FunctionKind
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.workflows.spec import Node as SpecNode
from wsgi_ts.workflows.spec import NodeKind, WorkflowSpec


@dataclass(frozen=True, slots=True)
class CompiledWorkflow:
    """What comes of a specification.

    Attributes:
        models: the nodes that are registered as models of their own.
        shared: the nodes that use a model which is registered by itself.
        functions: `ModelSpec.functions` of the functions' host; empty where there are none.
    """

    graph: Graph
    models: tuple[SpecNode, ...]
    shared: tuple[SpecNode, ...]
    functions: dict[str, dict[str, Any]]


def model_name(workflow: str, node: str) -> str:
    """The name under which a node is a model."""
    return f"{workflow}__{node}"


def compile_workflow(workflow: str, spec: WorkflowSpec, shown: str = "") -> CompiledWorkflow:
    """Makes the graph of a workflow.

    Its models are called after `workflow`: its name, or another until they have their own; `shown` is its name then.

    Raises:
        InvalidDag: a model has no archive.
    """
    nodes = list(spec.nodes.values())
    for node in nodes:
        if node.kind is NodeKind.MODEL and node.url is None and node.options.model is None:
            raise InvalidDag(f"{node.where}: the node {node.name} has no url: write below it where its archive is")
    place = {node.name: number for number, node in enumerate(nodes)}
    scatter = _scatters(spec, place)
    made = tuple(_node(workflow, node, place, scatter.get(node.name, -1)) for node in nodes)
    return CompiledWorkflow(
        Graph(workflow, made, timeout_ms=spec.timeout_ms),
        tuple(node for node in nodes if node.kind is NodeKind.MODEL and node.options.model is None),
        tuple(node for node in nodes if node.options.model is not None),
        _functions(workflow, shown or workflow, nodes),
    )


def _node(workflow: str, node: SpecNode, place: dict[str, int], scatter: int) -> Node:
    options, shared = node.options, node.options.model
    on_error = SKIP if options.optional and options.on_error != DEFAULT else options.on_error
    return Node(
        name=node.name,
        model=model_name(workflow, node.name) if shared is None else shared.name,
        version=None if shared is None else shared.version,
        is_function=node.kind is NodeKind.FUNCTION,
        parents=tuple(place[parent] for parent in node.parents),
        timeout_ms=node.numbers.timeout_ms,
        retries=node.numbers.retry_attempts,
        when="" if options.when is None else model_name(workflow, _gate(options.when)),
        on_error=on_error,
        default=_as_answer(options.default) if on_error == DEFAULT else "",
        reads_request=options.pass_request,
        scatters=options.scatter,
        gathers=options.gather,
        scatter=scatter,
    )


def _scatters(spec: WorkflowSpec, place: dict[str, int]) -> dict[str, int]:
    """For the nodes that run once for each element of a list: the node whose list that is."""
    found: dict[str, int] = {}
    for node in spec.nodes.values():
        if not node.options.scatter:
            continue
        (inner,) = node.successors
        while not spec.nodes[inner].options.gather:
            found[inner] = place[node.name]
            (inner,) = spec.nodes[inner].successors
    return found


def _functions(workflow: str, shown: str, nodes: list[SpecNode]) -> dict[str, dict[str, Any]]:
    functions: dict[str, dict[str, Any]] = {}
    for node in nodes:
        options = node.options
        if node.kind is NodeKind.FUNCTION:
            kind = FunctionKind.SCATTER if options.scatter else FunctionKind.NODE
            functions[node.name] = {"function": node.name, "kind": kind, "batch_size": options.batch_size or 1}
        if options.when is not None:
            functions[_gate(options.when)] = {"function": options.when, "kind": FunctionKind.WHEN, "batch_size": 1}
    for key, function in functions.items():
        function |= {"model": model_name(workflow, key), "shown": model_name(shown, key)}
    return functions


def _gate(function: str) -> str:
    """The name of a function that says whether a node runs: it may be a node as well."""
    return f"when:{function}"


def _as_answer(value: Any) -> str:
    """A value of the specification as the answer that stands for a node's."""
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
