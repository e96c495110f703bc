"""The workflows that an instance starts with: those of a snapshot, its predecessor's, or those of the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from wsgi_ts.errors import ConflictStatus, ServerError
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.startup import ModelsToStart
from wsgi_ts.settings.config import Config
from wsgi_ts.workflows.manager import WorkflowManager

# As for the models of the start: the supervisor's lines.
log = logging.getLogger("wsgi_ts.supervisor")

#: Arguments of a register call, and what they are called in a record.
_RECORDED = {"response_timeout": "responseTimeout", "startup_timeout": "startupTimeout"}


class StartupWorkflows:
    """Registers them, one after the other. One that fails is told in the log and left out.

    Args:
        config: the configuration.
        first: what the instance begins with.
        registry: tells whether the instance is stopping.
        manager: registers them.
        publish: makes the registry's present state known to the data path.
    """

    def __init__(
        self,
        config: Config,
        first: ModelsToStart,
        registry: Registry,
        manager: WorkflowManager,
        publish: Callable[[], None],
    ) -> None:
        self._config = config
        self._first = first
        self._registry = registry
        self._manager = manager
        self._publish = publish

    def expect(self) -> None:
        """Has the data path know of those that are about to be restored."""
        self._expect(self._first.workflows)

    def register(self) -> None:
        """Registers all of them; their models are there by now."""
        for name, record in self._first.workflows.items():
            self._register(name, str(record.get("warName")), record)
        self._expect({})
        if self._first.configured:
            for given_name, url in self._config.load_workflows:
                self._register(given_name, url, {})

    def _expect(self, records: Mapping[str, Any]) -> None:
        with self._registry.changed:
            self._registry.workflows.expect(records)
            self._publish()

    def _register(self, name: str | None, url: str, record: Mapping[str, Any]) -> None:
        if self._registry.draining:
            return
        given = {argument: record[key] for argument, key in _RECORDED.items() if key in record}
        fetched = bool(record.get("downloaded", False))
        try:
            self._manager.register(at_startup=True, fetched=fetched, url=url, workflow_name=name, **given)
        except ServerError as error:
            if self._first.workflows and isinstance(error, ConflictStatus):
                # The last supervisor had come to it.
                return
            log.error("Failed to load workflow: %s: %s", name or url, error.message)
        except Exception:
            log.exception("Failed to load workflow: %s", name or url)
