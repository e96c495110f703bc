"""Snapshots: the settings and the models of an instance in one file, from which it can be started again.

Files lie in `{log directory}/config` and are named `yyyyMMddHHmmssSSS-{startup|snapshot|shutdown}.cfg`: a
config.properties with the key `model_snapshot`, as TorchServe writes it. A start without a
configuration file takes the newest. A file appears whole or not at all; only its owner can read it, for settings may
hold passwords.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Literal

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.errors import ServerError
from wsgi_ts.models.recorded import RecordedModel
from wsgi_ts.models.registry import Registry
from wsgi_ts.plugins.snapshot import Store
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.given import given_settings
from wsgi_ts.settings.properties import format_property
from wsgi_ts.settings.sources import SNAPSHOT_NAME
from wsgi_ts.whole_files import replace_file

log = logging.getLogger(__name__)

#: So many files are kept, the newest ones; TorchServe keeps them all.
KEPT_FILES = 100

Occasion = Literal["startup", "snapshot", "shutdown"]
_STAMP = "%Y%m%d%H%M%S%f"


class SnapshotNotWritten(ServerError):
    """An operation was carried out, and is not in a snapshot."""


class SnapshotWriter:
    """Writes the snapshots of one instance, and what its guard knows of it; each call may come from another thread.

    Args:
        config: with `no_config_snapshots` no file is ever written.
        remember: called with the models after each change, with and without snapshots: a supervisor that follows this
            one has to go on with them. `started` there tells whether all models of the start are among them.
        store: keeps the snapshots in place of files; None: there is no such plugin.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        remember: Callable[[dict[str, Any]], None] = lambda models: None,
        store: Store | None = None,
    ) -> None:
        self._store = store
        self._config = config
        self._registry = registry
        self._directory = config.log_dir / "config"
        self._lock = threading.Lock()
        self._enabled = False
        self._not_restored: dict[tuple[str, str], RecordedModel] = {}
        self._remember = remember
        self._started = False
        self._last_kept: str | None = None

    def keep(self, model: RecordedModel) -> None:
        """Has a model that is not restored (yet) stay in the snapshots, until it is registered."""
        with self._lock:
            self._not_restored[model.name, model.version] = model

    def restored(self, model: RecordedModel) -> None:
        """A model was restored: whether it is in the snapshots is from now on the registry's affair."""
        with self._lock:
            self._not_restored.pop((model.name, model.version), None)

    def forget(self, name: str, version: str | None) -> RecordedModel | None:
        """Leaves a model that could not be restored out from now on; without a version, the default one.

        Returns its record; None where there is no such model.
        """
        with self._lock:
            found = [each for each in self._not_restored.values() if each.name == name]
            wanted = [each for each in found if each.version == version or (version is None and each.is_default)]
            for each in (wanted or (found if version is None else []))[:1]:
                return self._not_restored.pop((name, each.version))
            return None

    def start(self) -> None:
        """Writes the startup snapshot; from now on operations are recorded, unless this very file cannot be written."""
        self._started = True
        self._tell_guard()
        if self._config.no_config_snapshots:
            return
        try:
            # First of all: an operation that ends while the file is written is recorded after it.
            self._enabled = True
            self._write("startup")
        except OSError as error:
            self._enabled = False
            lost = "models registered from now on are lost at the next start"
            log.error("No snapshots are written, %s: %s: %s", lost, self._directory, error.strerror)

    def record(self) -> None:
        """Writes the state after an operation, before that is answered.

        Before the startup snapshot nothing is written: it would hold only some of the startup models.

        Raises:
            SnapshotNotWritten: the disk is full, or its like.
        """
        self._tell_guard()
        if not self._enabled:
            return
        try:
            self._write("snapshot")
        except OSError as error:
            log.error("The snapshot cannot be written: %s: %s", self._directory, error.strerror)
            raise SnapshotNotWritten(
                "The change was made, but could not be recorded: the next start will not know of it. See ts_log.log."
            ) from error

    def stop(self) -> None:
        """Writes the shutdown snapshot; none where the start was not finished, since models may be missing."""
        if not self._enabled:
            return
        try:
            self._write("shutdown")
        except OSError as error:
            log.error("The shutdown snapshot cannot be written: %s: %s", self._directory, error.strerror)

    def _tell_guard(self) -> None:
        with self._lock:
            models, _ = self._models()
            with self._registry.changed:
                at_startup = [each for each in self._registry.all_versions() if each.loaded_at_startup]
            for each in at_startup:
                if each.version in models.get(each.name, {}):
                    models[each.name][each.version]["atStartup"] = True
            kept = {"models": models, "started": self._started, "workflows": self._registry.workflow_records()}
            self._remember(kept)

    def _write(self, occasion: Occasion) -> None:
        with self._lock:
            if self._store is not None:
                name = f"{_stamp_after(self._last_kept)}-{occasion}.cfg"
                if self._store.keep(name, self._rows(name)):
                    self._last_kept = name
                    return
            # Each time, as TorchServe does: logs are removed under a running server.
            self._directory.mkdir(parents=True, exist_ok=True)
            known = sorted(name for name in os.listdir(self._directory) if SNAPSHOT_NAME.fullmatch(name))
            name = f"{_stamp_after(known[-1] if known else None)}-{occasion}.cfg"
            replace_file(self._directory / name, self._content(name), to_disk=True)
            for old in known[: max(0, len(known) + 1 - KEPT_FILES)]:
                (self._directory / old).unlink(missing_ok=True)

    def _rows(self, name: str) -> dict[str, str]:
        models, count = self._models()
        snapshot: dict[str, Any] = {
            "name": name,
            "modelCount": count,
            "created": time.time_ns() // 1_000_000,
            "models": models,
        }
        if workflows := self._registry.workflow_records():
            snapshot["workflows"] = workflows
        # The models first: of a file that was cut off later by hand, that is then missed.
        rows = {"model_snapshot": json.dumps(snapshot, indent=2), "version": TORCHSERVE_VERSION}
        if self._config.config_file is not None:
            rows["tsConfigFile"] = str(self._config.config_file)
        rows |= given_settings(self._config)
        return rows

    def _content(self, name: str) -> str:
        rows = self._rows(name)
        lines = [f"#Saving snapshot\n#{time.strftime('%a %b %d %H:%M:%S %Z %Y')}"]
        return "\n".join([*lines, *(format_property(key, value) for key, value in rows.items()), ""])

    def _models(self) -> tuple[dict[str, dict[str, Any]], int]:
        with self._registry.changed:
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
            versions = {
                (each.name, each.version): each
                for each in self._registry.all_versions()
                if not each.unloading and not each.workflow
            }
        recorded = {
            key: RecordedModel.from_model(model, is_default=key in defaults, config=self._config)
            for key, model in versions.items()
        }
        models: dict[str, dict[str, Any]] = {}
        self._not_restored = {key: model for key, model in self._not_restored.items() if key not in recorded}
        everything = self._not_restored | recorded
        for (name, version), model in everything.items():
            models.setdefault(name, {})[version] = model.to_json()
        return models, len(everything)


def _stamp_after(newest: str | None) -> str:
    """The present, local, to the millisecond; later than the newest file's even if the clock was put back."""
    now = datetime.now()
    if newest is not None and newest[:17] >= now.strftime(_STAMP)[:17]:
        try:
            now = datetime.strptime(newest[:17] + "000", _STAMP) + timedelta(milliseconds=1)
        except ValueError:
            log.warning("%s is not a time: the newest snapshot cannot be told by its name; remove that file", newest)
    return now.strftime(_STAMP)[:17]
