"""What is told of a workflow that could not be registered, and not be undone either."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
from support.wars import war

from wsgi_ts.errors import InternalServerError
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.registry import Registry
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.manager import WorkflowManager
from wsgi_ts.workflows.nodes import WorkflowNodes


class StuckNodes:
    """Nodes that cannot be registered, one of which stays all the same."""

    def register(self, workflow: Any) -> list[str]:
        return [f"Workflow Node {workflow.key}__m failed to register. Details: no"]

    def unregister(self, workflow: str) -> list[str]:
        return [f"Timed out while cleaning resources: {workflow}__n"]


def test_what_is_left_by_a_roll_back_is_told_among_the_failures(tmp_path: Path) -> None:
    war(tmp_path, "w", "models: {m: {url: m.mar}}\ndag: {m: []}\n")
    config = dataclasses.replace(Config(), workflow_store=tmp_path)
    publish = outstanding = cast("Any", lambda *_: 0)
    unpacked = tmp_path / "unpacked"
    manager = WorkflowManager(
        config, Registry(Numbers(9000)), cast("Any", None), unpacked, publish=publish, outstanding=outstanding
    )
    manager._nodes = cast("WorkflowNodes", StuckNodes())
    with pytest.raises(InternalServerError) as caught:
        manager.register(url="w.war")
    assert caught.value.message == (
        "Workflow w has failed to register. Failures: [Workflow Node w__m failed to register. Details: no, "
        "Error while doing rollback of failed workflow. DetailsTimed out while cleaning resources: w__n]"
    )
    assert not list(unpacked.iterdir())
