"""The workflows of one instance: what the data path has to know of each, and what the next start has."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wsgi_ts.batcher.shm.layout import MAX_WORKFLOWS
from wsgi_ts.models.version import ModelVersion


class WorkflowTable:
    """The registry's table of workflows; their nodes are models like all others.

    Args:
        lock: the registry's: models and workflows are published together.
        clear: removes what earlier owners of a number have counted under it, before a workflow gets it.
    """

    def __init__(self, lock: threading.Condition, clear: Callable[[int], None]) -> None:
        self._lock = lock
        self._clear = clear
        self._graphs: dict[str, dict[str, Any]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, str] = {}
        self._kept: dict[str, dict[str, Any]] = {}
        self._expected: frozenset[str] = frozenset()
        self._free_indexes = deque(range(MAX_WORKFLOWS))

    def set(self, name: str, key: str, graph: dict[str, Any], record: dict[str, Any]) -> None:
        """Notes a workflow: what the data path has to know of it (`graph`), and what the next start (`record`).

        Its nodes are registered for `key`.
        """
        with self._lock:
            before = self._graphs.get(name)
            if before is not None and _nodes_of(before) == _nodes_of(graph):
                index = before["index"]
            else:
                self.remove(name)
                index = self._free_indexes.popleft() if self._free_indexes else -1
                if index >= 0:
                    self._clear(index)
            self._graphs[name] = {**graph, "index": index}
            self._records[name], self._keys[name] = record, key
            self._kept.pop(name, None)

    def remove(self, name: str) -> None:
        """Forgets a workflow; its nodes stay."""
        with self._lock:
            gone = self._graphs.pop(name, None)
            self._records.pop(name, None)
            self._keys.pop(name, None)
            if gone is not None and gone["index"] >= 0:
                self._free_indexes.append(gone["index"])

    def keep(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Has the next start know of workflows that are not restored (yet), until they are registered or forgotten."""
        with self._lock:
            self._kept |= {name: record for name, record in records.items() if name not in self._records}

    def forget(self, name: str) -> dict[str, Any] | None:
        """Forgets a workflow that could not be restored; returns its record, None where there is no such workflow."""
        with self._lock:
            return self._kept.pop(name, None)

    def is_expected(self, name: str) -> bool:
        """Whether a workflow is about to be restored."""
        with self._lock:
            return name in self._expected and name not in self._graphs

    def expect(self, names: Iterable[str]) -> None:
        """Has the data path know of workflows that are about to be restored: it answers 503 for them, and not 404."""
        with self._lock:
            self._expected = frozenset(names)

    def graphs(self) -> dict[str, dict[str, Any]]:
        """What the data path knows of each workflow; `index` is its number on the board, -1 where it is not counted."""
        with self._lock:
            return dict(self._graphs)

    def records(self) -> dict[str, dict[str, Any]]:
        """What is to be known of each workflow at the next start, those that could not be restored among them."""
        with self._lock:
            return {**self._kept, **self._records}

    def keys(self) -> dict[str, str]:
        """What the nodes of each workflow are registered for, by the workflows' names."""
        with self._lock:
            return dict(self._keys)

    def routes(self) -> dict[str, dict[str, Any] | None]:
        """What is published: the graph of each workflow, None of one that is expected."""
        with self._lock:
            return {**dict.fromkeys(self._expected), **self._graphs}


def scaled_nodes(name: str, key: str, nodes: Iterable[ModelVersion]) -> dict[str, dict[str, int]]:
    """The workers of those nodes of a workflow that were scaled since it was registered, by their own names."""
    return {
        _own_name(model, name, key): {"minWorkers": model.min_workers, "maxWorkers": model.max_workers}
        for model in nodes
        if model.is_scaled
    }


def fetched_archives(name: str, key: str, nodes: Iterable[ModelVersion]) -> dict[str, str]:
    """The files of the model store that were fetched for nodes of a workflow, by the nodes' own names."""
    return {
        _own_name(model, name, key): model.directory.downloaded.name
        for model in nodes
        if model.directory.downloaded is not None
    }


def _own_name(model: ModelVersion, name: str, key: str) -> str:
    # A workflow that has replaced another has its own name last of all.
    prefix = key if model.name.startswith(f"{key}__") else name
    return model.name.removeprefix(f"{prefix}__")


def _nodes_of(graph: Mapping[str, Any]) -> list[str]:
    return [node["name"] for node in graph["nodes"]]
