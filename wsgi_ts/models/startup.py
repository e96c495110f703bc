"""The models that a supervisor starts with: its predecessor's, those of a snapshot, or those of the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from wsgi_ts.errors import ConflictStatus, ServerError
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.recorded import RecordedModel, SnapshotError, parse_models, recorded_models
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.snapshots import SnapshotWriter
from wsgi_ts.plugins.found import found_in
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config

# TorchServe's users look for these lines; they are the supervisor's.
log = logging.getLogger("wsgi_ts.supervisor")


@dataclass(frozen=True, slots=True)
class ModelsToStart:
    """What is registered first.

    Attributes:
        recorded: models with the numbers, versions and defaults that they had.
        source: where these come from, for people; empty: there was nothing to restore from.
        configured: whether the configuration's models are registered (after the recorded ones).
        workflows: the records of workflows, by name (see `wsgi_ts.workflows`).
    """

    recorded: Sequence[RecordedModel]
    source: str
    configured: bool
    workflows: Mapping[str, Any] = field(default_factory=dict)


def models_to_start(config: Config, kept: Mapping[str, Any] | None) -> ModelsToStart:
    """What an instance begins with.

    `kept` is what the guard has kept of the models of a supervisor that has died; None for a fresh start. The archives
    are not looked for then: one that has gone meanwhile must not keep the other models away.

    Raises:
        SnapshotError: the snapshot is damaged, or an archive is missing.
    """
    if kept is not None:
        try:
            recorded = parse_models(kept)
        except ValueError as error:
            raise SnapshotError(f"the models as the last supervisor has left them: {error}") from error
        unfinished = not kept["started"] and config.model_snapshot is None
        workflows = kept.get("workflows", {})
        return ModelsToStart(recorded, "what the last supervisor had", configured=unfinished, workflows=workflows)
    recorded = recorded_models(config)
    if config.model_snapshot is None:
        return ModelsToStart(recorded, "", configured=True)
    passed_over = f"; not loading {config.initial_models}" if config.load_models else ""
    kept_elsewhere = "model_snapshot" not in config.origins and bool(found_in(config.found_plugins, "snapshot"))
    place = "in the plugin's store" if kept_elsewhere else config.config_file
    source = f"the snapshot {place}{passed_over}; start with --ncs to begin without it"
    workflows = config.model_snapshot.get("workflows", {})
    if not isinstance(workflows, dict) or not all(isinstance(each, dict) for each in workflows.values()):
        fault = "model_snapshot: workflows is not an object of objects"
        raise SnapshotError(f"InvalidSnapshotException: {config.config_file}: {fault}")
    return ModelsToStart(recorded, source, configured=False, workflows=workflows)


@dataclass(frozen=True, slots=True)
class StartupModels:
    """Registers the models of the start, on a thread of its own. One that fails is told in the log and left out.

    Attributes:
        registry: tells whether the instance is stopping.
        snapshots: begins when they are registered, and keeps those that could not be restored.
        workflows: registers the workflows, after the models.
    """

    config: Config
    first: ModelsToStart
    registry: Registry
    manager: ModelManager
    snapshots: SnapshotWriter
    workflows: Callable[[], None] = lambda: None

    def register(self, done: Callable[[], None]) -> None:
        """Registers them, one after the other, and calls `done` unless the instance is stopping by then.

        Their workers load side by side.
        """
        if self.first.source:
            self._restore()
        if self.first.configured:
            self._load()
        self.workflows()
        if not self.registry.draining:
            self.snapshots.start()
            done()

    def _load(self) -> None:
        for name, url in self.config.load_models:
            if self.registry.draining:
                return
            try:
                self.manager.register(url=url, model_name=name, synchronous=False, at_startup=True)
            except ServerError as error:
                if self.first.recorded and isinstance(error, ConflictStatus):
                    # The last supervisor had come to it.
                    continue
                log.error("Failed to load model: %s: %s", url if name is None else name, error.message)
            except Exception:
                log.exception("Failed to load model: %s", url if name is None else name)
        for name in self.config.models:
            if not self.registry.has(name):
                log.warning(
                    "models: no model %s is loaded now, so its settings wait until one is registered; load_models "
                    "(--models) says what is loaded, and NAME=FILE.mar under which name",
                    name,
                )

    def _restore(self) -> None:
        recorded, source = self.first.recorded, self.first.source
        if not recorded and not self.first.configured:
            log.warning("Model snapshot is empty. Starting TorchServe without initial models.")
        log.info("Restoring %d model versions from %s", len(recorded), source)
        # What is recorded from now on holds all of them, whether their turn has come or not.
        for model in recorded:
            self.snapshots.keep(model)
        self.manager.expect(recorded)
        for model in recorded:
            if self.registry.draining:
                return
            try:
                self.manager.restore(model)
            except ServerError as error:
                log.error("Error while registering model. Details: %s %s: %s", model.name, model.version, error.message)
            except Exception:
                log.exception("Error while registering model. Details: %s %s", model.name, model.version)
            else:
                self.snapshots.restored(model)
        self.manager.expect(())
