"""`wsgi-ts workflow check`: what is wrong with a workflow, or will not do what it says, before any server has it.

Nothing of it is run: the specification and the handler file are read, the model store is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from wsgi_ts.archive.download import DownloadRules, is_fetched
from wsgi_ts.errors import InvalidDag
from wsgi_ts.workflows.document import Document, NoYaml, read_document
from wsgi_ts.workflows.functions import HandlerFile, read_handler_file
from wsgi_ts.workflows.source import Source
from wsgi_ts.workflows.spec import NUMBERS, Node, NodeKind, WorkflowSpec, spec_of

_MODEL_KEYS = ("url", *NUMBERS)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        level: FAIL: the server refuses it, or every request fails; WARN: it runs, but not as meant, or not everywhere.
        where: file and line, or the node.
        text: what it is, and what to do.
    """

    level: Literal["OK", "WARN", "FAIL"]
    where: str
    text: str

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{self.level:<4}  {self.where}: {self.text}"


def check_workflow(source: Source, model_store: Path | None = None) -> Iterator[Finding]:
    """All findings; of a specification that is none, only why. Without a model store no archives are looked for."""
    try:
        document = read_document(source.spec_text, source.spec_name)
        spec = spec_of(document)
    except NoYaml as error:
        yield Finding("FAIL", *_split(str(error)))
        return
    except InvalidDag as error:
        yield Finding("FAIL", *_split(error.message, error.where))
        return
    yield from _check_document(document, spec)
    yield from _check_functions(source, document, spec)
    yield from _check_numbers(document, spec)
    for node in spec.nodes.values():
        yield from _check_model(document, node, model_store)
    if len(spec.leaves) > 1:
        text = f"the leaves {', '.join(spec.leaves)} answer together: each has to answer with a JSON object"
        yield Finding("OK", document.place("dag"), text)
    yield _sum_up(spec, model_store)


def _split(message: str, where: str = "") -> tuple[str, str]:
    """Place and text of an error, which stand in the message unless `where` says more."""
    place, colon, text = message.partition(": ")
    if colon and (not where or where == place):
        return place, text
    return where, message


def _check_document(document: Document, spec: WorkflowSpec) -> Iterator[Finding]:
    for keys, line in document.duplicates:
        key = ".".join(map(str, keys))
        yield Finding("WARN", document.place(*keys), f"key {key} stands in line {line} too: that one does not count")
    models = document.data["models"]
    seen_model = ""
    for key, value in models.items():
        if key not in NUMBERS:
            seen_model = seen_model or key
            for name in value:
                if name not in _MODEL_KEYS:
                    text = f"key models.{key}.{name} is unknown and ignored; there are {', '.join(_MODEL_KEYS)}"
                    yield Finding("WARN", document.place("models", key, name), text)
        elif seen_model:
            text = f"{key} does not count for {seen_model}, which stands before it: put it in front of the models"
            yield Finding("WARN", document.place("models", key), text)
    for name in spec.unused:
        text = f"the graph does not name {name}: it is not loaded. Add it to dag, or remove it"
        yield Finding("WARN", document.place("models", name), text)
    for key in document.data:
        if key not in ("models", "dag", "options"):
            yield Finding("WARN", document.place(key), f"section {key} is unknown and ignored")


def _check_functions(source: Source, document: Document, spec: WorkflowSpec) -> Iterator[Finding]:
    wanted = {node.name: "dag" for node in spec.nodes.values() if node.kind is NodeKind.FUNCTION}
    gates = {node.options.when: node.name for node in spec.nodes.values() if node.options.when is not None}
    if source.handler_file is None:
        if source.is_archive:
            yield Finding("WARN", source.spec_name, "the archive names no handler: TorchServe refuses it (500)")
        for name in [*wanted, *gates]:
            text = f"{name} is a function, but no handler is given"
            yield Finding("FAIL" if source.is_archive else "WARN", _place(document, name), text)
        return
    file = source.handler_file.name
    try:
        handler = read_handler_file(source.handler_file)
    except SyntaxError as error:
        yield Finding("FAIL", f"{file}:{error.lineno or 1}", f"no Python: {error.msg}")
        return
    except OSError as error:
        yield Finding("FAIL", file, f"the handler cannot be read: {error.strerror}")
        return
    for name in wanted:
        yield from _check_function(handler, file, name, _place(document, name), f"node {name}")
    for name, node in gates.items():
        place = document.place("options", "nodes", node, "when")
        yield from _check_function(handler, file, name, place, f"when of node {node}")


def _check_function(handler: HandlerFile, file: str, name: str, place: str, role: str) -> Iterator[Finding]:
    found = handler.functions.get(name)
    if found is not None and found.takes_two is False:
        text = f"{name} cannot be called as {name}(data, context), which {role} is"
        yield Finding("FAIL", f"{file}:{found.line}", text)
    elif found is None and handler.has_one_class and not handler.is_open:
        text = f"{role}: {file} has no function {name}; the method handle of its one class is used"
        yield Finding("WARN", place, text)
    elif not handler.has(name):
        yield Finding("FAIL", place, f"{role}: {file} has no function {name}, and models has no model of that name")


def _place(document: Document, node: str) -> str:
    """Where the graph first names a node."""
    dag: dict[str, Any] = document.data["dag"]
    if node in dag:
        return document.place("dag", node)
    return next((document.place("dag", key) for key, names in dag.items() if node in names), document.name)


def _own_models(spec: WorkflowSpec) -> list[Node]:
    """The nodes that load a model of their own."""
    return [node for node in spec.nodes.values() if node.kind is NodeKind.MODEL and node.options.model is None]


def _number_at(document: Document, node: Node, key: str) -> str:
    """Where a number of a model stands: at the model, or above all."""
    own = ("models", node.name, key)
    return document.place(*(own if own in document.lines else ("models", key)))


def _check_numbers(document: Document, spec: WorkflowSpec) -> Iterator[Finding]:
    too_long: dict[tuple[str, int, int], list[str]] = {}
    for node in _own_models(spec):
        numbers = node.numbers
        if numbers.batch_size != 1 and numbers.max_batch_delay_ms >= numbers.timeout_ms:
            place = _number_at(document, node, "max-batch-delay")
            too_long.setdefault((place, numbers.max_batch_delay_ms, numbers.timeout_ms), []).append(node.name)
        if numbers.max_workers <= 0:
            text = f"{node.name}: max-workers {numbers.max_workers} starts no worker: every request fails"
            yield Finding("FAIL", _number_at(document, node, "max-workers"), text)
        elif numbers.min_workers > numbers.max_workers:
            text = f"{node.name}: min-workers {numbers.min_workers} is above max-workers {numbers.max_workers}"
            yield Finding("WARN", _number_at(document, node, "min-workers"), f"{text}, and ignored")
    for (place, delay, timeout), names in too_long.items():
        text = (
            f"{', '.join(names)}: max-batch-delay {delay} ms is not below timeout-ms {timeout} ms. TorchServe lets a "
            "request that is alone wait for the whole delay, so that it times out; wsgi-ts does not wait for a batch "
            "that is not coming. Set a max-batch-delay well below"
        )
        yield Finding("WARN", place, text)


def _check_model(document: Document, node: Node, model_store: Path | None) -> Iterator[Finding]:
    if node.kind is NodeKind.FUNCTION:
        return
    if node.url is None:
        if node.options.model is None:
            yield Finding(
                "FAIL", document.place("models", node.name), f"{node.name} has no url: no model can be loaded"
            )
        else:
            text = f"{node.name} has no url: TorchServe takes it for a function. With a url it loads there too"
            yield Finding("WARN", document.place("options", "nodes", node.name, "model"), text)
    elif node.options.model is None and model_store is not None and _archive(node.url, model_store) is None:
        if is_fetched(node.url, DownloadRules()):
            return
        place = document.place("models", node.name, "url")
        yield Finding("FAIL", place, f"{node.name}: {node.url} is not in the model store {model_store}")


def _archive(url: str, model_store: Path) -> Path | None:
    found = model_store / os.path.basename(url.rstrip("/"))
    return found if os.path.exists(found) else None


def _sum_up(spec: WorkflowSpec, model_store: Path | None) -> Finding:
    """How many processes the workflow has, and how much memory its models take, by the size of their files."""
    models = _own_models(spec)
    functions = sum(node.kind is NodeKind.FUNCTION for node in spec.nodes.values())
    workers = sum(max(0, node.numbers.max_workers) for node in models)
    told = f"{len(spec.nodes)} nodes: {workers} model workers"
    if functions:
        told += f", and one process for {functions} functions"
    if model_store is None:
        return Finding("OK", "processes", told)
    needed = 0
    for node in models:
        archive = _archive(node.url, model_store) if node.url else None
        needed += max(0, node.numbers.max_workers) * _size(archive) if archive is not None else 0
    there = psutil.virtual_memory().total
    told = f"{told}; each worker loads its model: {_megabytes(needed)} of files in all"
    if needed > there:
        return Finding("WARN", "processes", f"{told}, and this machine has {_megabytes(there)} of memory")
    return Finding("OK", "processes", told)


def _size(archive: Path) -> int:
    if archive.is_file():
        return archive.stat().st_size
    return sum(file.stat().st_size for file in archive.rglob("*") if file.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
