"""The specification of a workflow: models, their numbers, and the graph that a request goes through.

Read as TorchServe reads it, in one pass over the file: a global number counts for the models that are written after it,
and the last one for the functions. What ends there in an exception of Java is an `InvalidDag` here that names key and
line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from enum import Enum
from typing import Any

from wsgi_ts.archive.manifest import check_name
from wsgi_ts.batcher.shm.layout import MAX_MODELS
from wsgi_ts.errors import BadRequest, InvalidDag, InvalidWorkflow
from wsgi_ts.models.arguments import MAX_BATCH_SIZE, MAX_WORKERS
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.conversion import shown
from wsgi_ts.workflows.document import Document, NoYaml, read_document
from wsgi_ts.workflows.options import NO_OPTIONS, NodeOptions, read_options, wrong


class NodeKind(Enum):
    """What a node is."""

    MODEL = "model"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class Numbers:
    """The six numbers of a model, or their defaults.

    Attributes:
        min_workers: reported by describe only.
        max_workers: workers of the model; 0 or less for none.
        batch_size: most requests in one call of the handler; -1 for that of model-config.yaml.
        max_batch_delay_ms: longest wait for a batch to fill; -100 for that of model-config.yaml.
        retry_attempts: further attempts after the first.
        timeout_ms: longest wait for the answer of one attempt, waiting in the queue included.
    """

    min_workers: int = 1
    max_workers: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int = 50
    retry_attempts: int = 1
    timeout_ms: int = 10_000


_LEAST, _MOST = -(2**31), 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The values that a number of the specification may have.

    Attributes:
        field: the number's name in Numbers.
        least, most: the bounds.
        of_archive: a value besides, which stands for that of the model's model-config.yaml.
    """

    field: str
    least: int
    most: int = _MOST
    of_archive: int | None = None

    def fault(self, value: int) -> str:
        """What is wrong with a value; empty where nothing is."""
        if value == self.of_archive or self.least <= value <= self.most:
            return ""
        besides = "" if self.of_archive is None else f", or {self.of_archive} for that of model-config.yaml"
        return f"{value} is not between {self.least} and {self.most}{besides}"


#: The keys of the numbers. Of the workers those below 0 count as 0, as in TorchServe; nothing is made of `min-workers`.
NUMBERS = {
    "min-workers": Limits("min_workers", _LEAST),
    "max-workers": Limits("max_workers", _LEAST, MAX_WORKERS),
    "batch-size": Limits("batch_size", 1, MAX_BATCH_SIZE, of_archive=-1),
    "max-batch-delay": Limits("max_batch_delay_ms", 0, of_archive=-100),
    "retry-attempts": Limits("retry_attempts", 0),
    "timeout-ms": Limits("timeout_ms", 1),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the graph; it is registered as the model `{workflow}__{name}`.

    Attributes:
        name: a model of the section `models`, else a function of the handler file.
        kind: which of the two; a node with `options.model` is a model in any case.
        url: the model's archive; None for a function and where `options.model` names the model.
        numbers: as they count for this node.
        parents: the nodes whose answers it gets, in file order. The only one's answer is its `body`, of several each is
            called as its parent.
        successors: the nodes that get its answer, in file order; none for a leaf.
        options: what TorchServe does not know.
        where: file, line and key of its model, for messages.
    """

    name: str
    kind: NodeKind
    url: str | None
    numbers: Numbers
    parents: tuple[str, ...]
    successors: tuple[str, ...]
    options: NodeOptions = NO_OPTIONS
    where: str = ""


@dataclass(frozen=True, slots=True)
class WorkflowSpec:
    """A checked specification.

    Attributes:
        numbers: the global numbers, as describe reports them.
        nodes: all nodes by name, in the order in which the graph first names them.
        order: their names so that each stands behind its parents; otherwise in file order.
        start: the one node without parents.
        leaves: the nodes without successors, in file order.
        dag_text: the graph as describe prints it.
        unused: models that the graph does not name; they are not loaded.
        timeout_ms: how long a request may take as a whole; 0 where the options do not say.
    """

    numbers: Numbers
    nodes: dict[str, Node]
    order: tuple[str, ...]
    start: str
    leaves: tuple[str, ...]
    dag_text: str
    unused: tuple[str, ...] = ()
    timeout_ms: int = 0


def parse_spec(text: str, name: str = "spec.yaml") -> WorkflowSpec:
    """Reads a specification; the file's name is for messages.

    Raises:
        InvalidWorkflow: it is no YAML.
        InvalidDag: it is no specification, or its graph is none.
    """
    try:
        return spec_of(read_document(text, name))
    except NoYaml as error:
        raise InvalidWorkflow("Failed to parse yaml.") from error


def spec_of(document: Document) -> WorkflowSpec:
    """The specification that a YAML document is.

    Raises:
        InvalidDag: it is none, or its graph is none.
    """
    if not isinstance(document.data, dict):
        raise InvalidDag(f"{document.name}: not a mapping with the sections models and dag", document.name)
    numbers, models = _read_models(document, _section(document, "models"))
    dag = _section(document, "dag")
    graph = _read_graph(document, dag)
    if len(graph.successors) > MAX_MODELS:
        raise wrong(document, f"{len(graph.successors)} nodes, and no more than {MAX_MODELS} can be registered", "dag")
    order = graph.check()
    options = read_options(document, graph.successors)
    nodes = {name: _node(name, models.get(name), numbers, graph, options.nodes) for name in graph.successors}
    _check_nodes(document, nodes, order[0])
    return WorkflowSpec(
        numbers=numbers,
        nodes=nodes,
        order=order,
        start=order[0],
        leaves=tuple(name for name, node in nodes.items() if not node.successors),
        dag_text=java_text(dag),
        unused=tuple(name for name in models if name not in nodes),
        timeout_ms=options.timeout_ms,
    )


def java_text(value: Any) -> str:
    """A mapping, list, text or nothing as Java prints it: `{pre_processing=[m1], m1=[]}`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={java_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(java_text, value)) + "]"
    return "null" if value is None else str(value)


def _section(document: Document, key: str) -> dict[Any, Any]:
    if key not in document.data:
        raise InvalidDag(f"{document.name}: the section {key} is missing", document.name)
    section = document.data[key]
    if not isinstance(section, dict):
        raise wrong(document, f"{shown(section)} is not a mapping of keys to values", key)
    return section


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the section `models`."""

    url: str | None
    numbers: Numbers


def _read_models(document: Document, section: dict[Any, Any]) -> tuple[Numbers, dict[str, _Model]]:
    """The global numbers as they are at the end, and the models."""
    numbers = Numbers()
    models = {}
    for key, value in section.items():
        _check_node_name(document, key, "models", key)
        if key in NUMBERS:
            numbers = _with_number(document, numbers, key, value, "models", key)
            continue
        if not isinstance(value, dict):
            fault = (
                f"{shown(value)} is not a mapping: write `url: {value}` below it" if isinstance(value, str) else None
            )
            raise wrong(document, fault or f"{shown(value)} is not a mapping of keys to values", "models", key)
        url = value.get("url")
        if url is not None and not isinstance(url, str):
            raise wrong(document, f"{shown(url)} is not a text", "models", key, "url")
        own = numbers
        for name in NUMBERS:
            if name in value:
                own = _with_number(document, own, name, value[name], "models", key, name)
        models[key] = _Model(url, own)
    return numbers, models


def _with_number(document: Document, numbers: Numbers, name: str, value: Any, *keys: Any) -> Numbers:
    limits = NUMBERS[name]
    if type(value) is not int:
        hint = ": remove the quotes" if isinstance(value, str) and value.strip().lstrip("-").isdigit() else ""
        raise wrong(document, f"{shown(value)} is not a whole number{hint}", *keys)
    fault = limits.fault(value)
    if fault:
        raise wrong(document, fault, *keys)
    return replace(numbers, **{limits.field: value})


def _check_node_name(document: Document, name: Any, *keys: Any) -> None:
    if not isinstance(name, str):
        raise wrong(document, f"{shown(name)} is not a text, which a name has to be: put it in quotes", *keys)
    try:
        check_name("Node name", name)
    except BadRequest as error:
        raise wrong(document, error.message, *keys) from error


@dataclass(slots=True)
class _Graph:
    """The nodes and edges, in the order of the file."""

    document: Document
    successors: dict[str, list[str]] = field(default_factory=dict)
    parents: dict[str, list[str]] = field(default_factory=dict)

    def add_node(self, name: str) -> None:
        self.successors.setdefault(name, [])
        self.parents.setdefault(name, [])

    def add_edge(self, parent: str, child: str) -> None:
        self.add_node(child)
        place = self.document.place("dag", parent)
        if child == parent:
            raise InvalidDag("Self loop exception", place)
        if child in self.successors[parent]:
            raise InvalidDag("loop exception", place)
        self.successors[parent].append(child)
        self.parents[child].append(parent)

    def check(self) -> tuple[str, ...]:
        """The names, each behind its parents.

        Raises:
            InvalidDag: there is not one start node, or a cycle.
        """
        place = self.document.place("dag")
        if sum(not parents for parents in self.parents.values()) != 1:
            raise InvalidDag("DAG should have only one start node", place)
        order: list[str] = []
        waiting = {name: len(parents) for name, parents in self.parents.items()}
        ready = [name for name, count in waiting.items() if not count]
        while ready:
            name = ready.pop(0)
            order.append(name)
            for child in self.successors[name]:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
        if len(order) != len(self.parents):
            raise InvalidDag("Not a valid DAG", place)
        return tuple(order)


def _read_graph(document: Document, dag: dict[Any, Any]) -> _Graph:
    graph = _Graph(document)
    for name, successors in dag.items():
        _check_node_name(document, name, "dag", name)
        graph.add_node(name)
        if not isinstance(successors, list):
            hint = f": write [{successors}]" if isinstance(successors, str) else ""
            raise wrong(document, f"{shown(successors)} is not a list of nodes{hint}", "dag", name)
        for successor in successors:
            if successor is None or (isinstance(successor, str) and not successor.strip()):
                continue
            _check_node_name(document, successor, "dag", name)
            graph.add_edge(name, successor)
    return graph


def _node(name: str, model: _Model | None, numbers: Numbers, graph: _Graph, options: Mapping[str, NodeOptions]) -> Node:
    own = options.get(name, NO_OPTIONS)
    is_function = model is None and own.model is None
    if model is None:
        model = _Model(None, replace(numbers, min_workers=1, max_workers=1, batch_size=1, max_batch_delay_ms=0))
    return Node(
        name,
        NodeKind.FUNCTION if is_function else NodeKind.MODEL,
        model.url,
        replace(model.numbers, batch_size=own.batch_size) if is_function and own.batch_size else model.numbers,
        tuple(graph.parents[name]),
        tuple(graph.successors[name]),
        own,
        graph.document.where("models", name),
    )


def _check_nodes(document: Document, nodes: dict[str, Node], start: str) -> None:
    """Refuses options that do not go with the node, or with each other."""
    options = nodes[start].options
    for name, is_there in (("when", options.when), ("optional", options.optional), ("gather", options.gather)):
        if is_there:
            raise wrong(document, "does not go with the start node", "options", "nodes", start, name)
    if options.on_error == "skip":
        fault = "the start node cannot be skipped: nothing would be left to answer"
        raise wrong(document, fault, "options", "nodes", start, "on-error")
    gathering: set[str] = set()
    for node in nodes.values():
        if node.options.batch_size is not None and node.kind is NodeKind.MODEL:
            fault = "is for functions; that of a model stands in models"
            raise wrong(document, fault, "options", "nodes", node.name, "batch-size")
        if node.options.scatter:
            gathering.add(_gathering_node(document, nodes, node))
    for node in nodes.values():
        if node.options.gather and node.name not in gathering:
            raise wrong(document, "there is no node with scatter before it", "options", "nodes", node.name, "gather")


def _gathering_node(document: Document, nodes: dict[str, Node], node: Node) -> str:
    """The node that gathers what `node` scatters: both ends of a chain without branches.

    Raises:
        InvalidDag: there is none.
    """
    if node.options.on_error == "default":
        fault = "scatter does not go with a default: remove one of them"
        raise wrong(document, fault, "options", "nodes", node.name, "on-error")
    at = node
    while True:
        if len(at.successors) != 1 or len(nodes[at.successors[0]].parents) != 1:
            fault = f"what follows has to be a chain up to a node with gather, which it is not at {at.name}"
            raise wrong(document, fault, "options", "nodes", node.name, "scatter")
        before, at = at, nodes[at.successors[0]]
        if at.options.gather and before is node:
            fault = f"nothing stands between it and {at.name}, which gathers: put what is to run for each item there"
            raise wrong(document, fault, "options", "nodes", node.name, "scatter")
        if at.options.gather:
            return at.name
        if at.options.scatter:
            fault = f"the items would be scattered again at {at.name}, before they are gathered"
            raise wrong(document, fault, "options", "nodes", node.name, "scatter")
