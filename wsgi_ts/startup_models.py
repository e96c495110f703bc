"""The models that an instance starts with: those of its snapshot, or else those of its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from wsgi_ts.config import Config
from wsgi_ts.errors import ServerError
from wsgi_ts.model_manager import ModelManager
from wsgi_ts.registry import Registry
from wsgi_ts.snapshots import RecordedModel, SnapshotWriter

# TorchServe's users look for these lines; they are the supervisor's.
log = logging.getLogger("wsgi_ts.server")


class StartupModels:
    """Registers the models of the start, on a thread of its own. One that fails is told in the log and left out.

    Args:
        config: the configuration.
        recorded: the models of the snapshot that the configuration is from.
        registry: tells whether the instance is stopping.
        manager: registers them.
        snapshots: begins when they are registered, and keeps those that could not be restored.
    """

    def __init__(
        self,
        config: Config,
        recorded: Sequence[RecordedModel],
        registry: Registry,
        manager: ModelManager,
        snapshots: SnapshotWriter,
    ) -> None:
        self._config = config
        self._recorded = recorded
        self._registry = registry
        self._manager = manager
        self._snapshots = snapshots

    def register(self, done: Callable[[], None]) -> None:
        """Registers them, one after the other; their workers load side by side.

        Args:
            done: called at the end, unless the instance is stopping by then.
        """
        if self._config.model_snapshot is None:
            self._load()
        else:
            self._restore()
        if not self._registry.draining:
            self._snapshots.start()
            done()

    def _load(self) -> None:
        for name, url in self._config.load_models:
            if self._registry.draining:
                return
            try:
                self._manager.register(url=url, model_name=name, synchronous=False, at_startup=True)
            except ServerError as error:
                log.error("Failed to load model: %s: %s", url if name is None else name, error.message)
            except Exception:
                log.exception("Failed to load model: %s", url if name is None else name)

    def _restore(self) -> None:
        if not self._recorded:
            log.warning("Model snapshot is empty. Starting TorchServe without initial models.")
        log.info(
            "Restoring %d model versions from the snapshot %s%s; start with --ncs to begin without it",
            len(self._recorded),
            self._config.config_file,
            f"; not loading {self._config.initial_models}" if self._config.load_models else "",
        )
        for model in self._recorded:
            if self._registry.draining:
                return
            try:
                self._manager.restore(model)
            except ServerError as error:
                self._snapshots.keep(model)
                log.error("Error while registering model. Details: %s %s: %s", model.name, model.version, error.message)
            except Exception:
                self._snapshots.keep(model)
                log.exception("Error while registering model. Details: %s %s", model.name, model.version)
