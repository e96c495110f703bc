"""What is told of a workflow that could not be registered, and not be undone either; what its nodes belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
from support.wars import war

from wsgi_ts.errors import ConflictStatus, InternalServerError
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.manager import WorkflowManager
from wsgi_ts.workflows.nodes import WorkflowNodes


class StuckNodes:
    """Nodes that cannot be registered, one of which stays all the same."""

    def register(self, workflow: Any, fetched: Any) -> list[str]:
        return [f"Workflow Node {workflow.key}__m failed to register. Details: no"]

    def unregister(self, workflow: str) -> list[str]:
        return [f"Timed out while cleaning resources: {workflow}__n"]


class NotedNodes:
    """Nodes that are registered, or fail, without anything being done; `keys`: what they were registered for."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.failures: list[str] = []

    def register(self, workflow: Any, fetched: Any) -> list[str]:
        self.keys.append(workflow.key)
        return self.failures

    def unregister(self, workflow: str) -> list[str]:
        return []

    def taken_names(self, before: Any, workflow: Any) -> list[str]:
        return []

    def scale(self, workflow: Any, scaled: Any) -> None:
        assert not scaled


def manager_of(store: Path, nodes: Any) -> WorkflowManager:
    config = dataclasses.replace(Config(), workflow_store=store)
    publish = outstanding = cast("Any", lambda *_: 0)
    registry, unpacked = Registry(Numbers(9000)), store / "unpacked"
    manager = WorkflowManager(config, registry, cast("Any", None), unpacked, publish=publish, outstanding=outstanding)
    manager._nodes = cast("WorkflowNodes", nodes)
    return manager


def test_the_nodes_of_one_workflow_are_never_taken_for_another_s(tmp_path: Path) -> None:
    """Beside the present one a workflow has another name for a while, which may be a third one's."""
    for name in ("w", "w~1", "w~3"):
        war(tmp_path, name, "models: {m: {url: m.mar}}\ndag: {m: []}\n")
    nodes = NotedNodes()
    manager = manager_of(tmp_path, nodes)
    for name in ("w", "w~1"):
        manager.register(url=f"{name}.war")
    nodes.failures = ["no"]
    for _ in range(2):
        with pytest.raises(InternalServerError):
            manager.register(url="w.war", replace=True)
    assert nodes.keys == ["w", "w~1", "w~2", "w~3"]
    manager._registry.workflows.set("w", "w~3", {"nodes": []}, {})
    with pytest.raises(ConflictStatus):
        manager.register(url="w~3.war")


def test_what_is_left_by_a_roll_back_is_told_among_the_failures(tmp_path: Path) -> None:
    war(tmp_path, "w", "models: {m: {url: m.mar}}\ndag: {m: []}\n")
    unpacked = tmp_path / "unpacked"
    manager = manager_of(tmp_path, StuckNodes())
    with pytest.raises(InternalServerError) as caught:
        manager.register(url="w.war")
    assert caught.value.message == (
        "Workflow w has failed to register. Failures: [Workflow Node w__m failed to register. Details: no, "
        "Error while doing rollback of failed workflow. DetailsTimed out while cleaning resources: w__n]"
    )
    assert not list(unpacked.iterdir())
