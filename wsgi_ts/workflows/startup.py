"""The workflows that an instance starts with: those of a snapshot, its predecessor's, or those of the configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from wsgi_ts.errors import ConflictStatus, ServerError
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.startup import ModelsToStart
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.manager import WorkflowManager

# As for the models of the start: the supervisor's lines.
log = logging.getLogger("wsgi_ts.supervisor")

#: Arguments of a register call, and what they are called in a record.
_RECORDED = {"response_timeout": "responseTimeout", "startup_timeout": "startupTimeout"}


@dataclass(frozen=True, slots=True)
class StartupWorkflows:
    """Registers them, one after the other. One that fails is told in the log; of a snapshot, it stays in later ones.

    Attributes:
        first: what the instance begins with.
        publish: makes the registry's present state known to the data path.
    """

    config: Config
    first: ModelsToStart
    registry: Registry
    manager: WorkflowManager
    publish: Callable[[], None]

    def expect(self) -> None:
        """Has the data path know of those that are about to be restored, and the snapshots keep them until they are."""
        self.registry.workflows.keep(self.first.workflows)
        self._expect(self.first.workflows)

    def register(self) -> None:
        """Registers all of them; their models are there by now."""
        for name, record in self.first.workflows.items():
            self._register(name, str(record.get("warName")), record)
        self._expect({})
        if self.first.configured:
            for given_name, url in self.config.load_workflows:
                self._register(given_name, url, {})

    def _expect(self, records: Mapping[str, Any]) -> None:
        with self.registry.changed:
            self.registry.workflows.expect(records)
            self.publish()

    def _register(self, name: str | None, url: str, record: Mapping[str, Any]) -> None:
        if self.registry.draining:
            return
        given = {argument: record[key] for argument, key in _RECORDED.items() if key in record}
        fetched, scaled = bool(record.get("downloaded", False)), record.get("scaled")
        given["scaled"] = scaled if isinstance(scaled, dict) else {}
        files = record.get("fetchedModels")
        given["fetched_models"] = {
            str(node): os.path.basename(str(file)) for node, file in (files if isinstance(files, dict) else {}).items()
        }
        try:
            self.manager.register(at_startup=True, fetched=fetched, url=url, workflow_name=name, **given)
        except ServerError as error:
            if self.first.workflows and isinstance(error, ConflictStatus):
                # The last supervisor had come to it.
                return
            log.error("Failed to load workflow: %s: %s", name or url, error.message)
        except Exception:
            log.exception("Failed to load workflow: %s", name or url)
