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
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.archive.model_directory import check_name, known_runtime
from wsgi_ts.errors import BadRequest, ServerError
from wsgi_ts.models.registry import ModelVersion, Registry
from wsgi_ts.settings.config import Config, property_settings
from wsgi_ts.settings.conversion import to_boolean, to_text
from wsgi_ts.settings.model_entries import convert_entry
from wsgi_ts.settings.properties import format_property

log = logging.getLogger(__name__)

#: So many files are kept, the newest ones; TorchServe keeps them all.
KEPT_FILES = 100

Occasion = Literal["startup", "snapshot", "shutdown"]
_FILE_NAME = re.compile(r"([0-9]{17})-(startup|snapshot|shutdown)\.cfg")
_AT_STARTUP = "atStartup"
_STAMP = "%Y%m%d%H%M%S%f"
#: What only our snapshots say of a model.
_OURS: Mapping[str, Callable[[Any], Any]] = {
    "directory": to_text,
    "handler": to_text,
    "downloaded": to_boolean,
    _AT_STARTUP: to_boolean,
}
#: Numbers of a recorded model: JSON key, field, least value.
_NUMBERS = (
    ("minWorkers", "min_workers", 0),
    ("maxWorkers", "max_workers", 0),
    ("batchSize", "batch_size", 1),
    ("maxBatchDelay", "max_batch_delay_ms", 0),
    ("responseTimeout", "response_timeout_s", 0),
    ("startupTimeout", "startup_timeout_s", 0),
)


class SnapshotError(Exception):
    """A snapshot from which no instance can be started; the message says which and why, on one line."""


class SnapshotNotWritten(ServerError):
    """An operation was carried out, and is not in a snapshot."""


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """One model version of a snapshot; None where the snapshot says nothing.

    Attributes:
        name: the model.
        version: its version.
        is_default: whether it was the default version.
        archive: its archive's name in the model store.
        directory: the directory that it was used in place from, where that is not in the model store.
        downloaded: whether the archive was fetched for it, and goes with it when it is unregistered.
        handler: the handler that was given in place of the manifest's.
        runtime: `python` or `python3`.
        at_startup: the configuration named it; only in the record that the guard keeps.
        min_workers: wanted workers; then the other numbers, delays in milliseconds and time-outs in seconds.
    """

    name: str
    version: str
    is_default: bool
    archive: str
    directory: str | None = None
    downloaded: bool = False
    handler: str | None = None
    runtime: str | None = None
    at_startup: bool = False
    min_workers: int | None = None
    max_workers: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None
    response_timeout_s: int | None = None
    startup_timeout_s: int | None = None

    @property
    def url(self) -> str:
        """Where it is registered from."""
        return self.directory or self.archive

    @classmethod
    def from_model(cls, model: ModelVersion, *, is_default: bool, config: Config) -> RecordedModel:
        """What is to be recorded of a registered version."""
        spec, directory = model.spec, model.directory
        named = directory.manifest.handler or config.default_service_handler or ""
        in_place = not directory.extracted and not _is_in_store(directory.path, config.model_store)
        archive = directory.downloaded.name if directory.downloaded else os.path.basename(directory.url.rstrip("/"))
        return cls(
            name=model.name,
            version=model.version,
            is_default=is_default,
            archive=archive,
            directory=str(directory.path) if in_place else None,
            downloaded=directory.downloaded is not None,
            handler=spec.handler if spec.handler != named else None,
            runtime=spec.runtime,
            min_workers=model.min_workers,
            max_workers=model.max_workers,
            batch_size=spec.batch_size,
            max_batch_delay_ms=spec.max_batch_delay_ms,
            response_timeout_s=int(spec.response_timeout_s),
            startup_timeout_s=int(spec.startup_timeout_s),
        )

    @classmethod
    def from_json(cls, name: str, version: str, fields: Any) -> RecordedModel:
        """Reads one version's entry.

        Raises:
            ValueError: something in it makes no sense.
        """
        where = f"model {name!r}, version {version!r}"
        entry = convert_entry(name, version, fields)
        archive = entry.get("marName")
        if archive is None:
            raise ValueError(f"{where}: no marName")
        # TorchServe records the empty text for a folder that was registered with a slash at the end.
        archive = archive or name
        try:
            for what, word in (("Model name", name), ("Model version", version), ("marName", archive)):
                check_name(what, word)
            ours = {key: read(entry[key]) for key, read in _OURS.items() if key in entry}
        except (BadRequest, ValueError) as error:
            raise ValueError(f"{where}: {error.message if isinstance(error, BadRequest) else error}") from None
        return cls(
            name,
            version,
            entry.get("defaultVersion", False),
            archive,
            directory=ours.get("directory"),
            downloaded=ours.get("downloaded", False),
            handler=ours.get("handler"),
            runtime=known_runtime(entry.get("runtimeType")),
            at_startup=ours.get(_AT_STARTUP, False),
            # TorchServe records numbers as they were given, such as a delay of -10000 ms for "do not wait".
            **{field: max(least, entry[key]) for key, field, least in _NUMBERS if key in entry},
        )

    def to_json(self) -> dict[str, Any]:
        """The entry: TorchServe's keys, then ours where they say something."""
        entry: dict[str, Any] = {"defaultVersion": self.is_default, "marName": self.archive}
        entry |= {key: getattr(self, field) for key, field, _ in _NUMBERS}
        ours = {"directory": self.directory, "handler": self.handler, "downloaded": self.downloaded or None}
        entry |= {"runtimeType": self.runtime, **ours}
        return {key: value for key, value in entry.items() if value is not None}


def recorded_models(config: Config) -> list[RecordedModel]:
    """The models of the snapshot that an instance is started from, each one's archive being there.

    Raises:
        SnapshotError: the snapshot is damaged, or an archive is missing.
    """
    snapshot = config.model_snapshot
    if snapshot is None:
        file = config.config_file
        if file is not None and _FILE_NAME.fullmatch(file.name):
            raise SnapshotError(f"{file}: a snapshot without the key model_snapshot; remove it, or start with --ncs")
        return []
    try:
        found = parse_models(snapshot)
    except ValueError as error:
        raise SnapshotError(f"InvalidSnapshotException: {config.config_file}: model_snapshot: {error}") from None
    for model in found:
        exists = config.model_store is not None and (config.model_store / model.archive).exists()
        if not (os.path.isdir(model.directory) if model.directory else exists):
            raise SnapshotError(
                f"InvalidSnapshotException: Model archive file for model :{model.name}, version :{model.version} "
                f"not found in model store ({model.url}, in {config.config_file}); put it back, or start with --ncs"
            )
    return found


def parse_models(snapshot: Mapping[str, Any]) -> list[RecordedModel]:
    """The models of a snapshot, or of the record that the guard keeps.

    Raises:
        ValueError: something in it makes no sense.
    """
    models = snapshot.get("models", {})
    if not isinstance(models, dict):
        raise ValueError("models is not an object")
    found: list[RecordedModel] = []
    for name, versions in models.items():
        if not isinstance(versions, dict):
            raise ValueError(f"model {name!r}: not an object of versions")
        found += [RecordedModel.from_json(name, version, fields) for version, fields in versions.items()]
    # The default version first: the first one that is registered becomes it, whatever happens to the others.
    return sorted(found, key=lambda model: not model.is_default)


def _is_in_store(path: Path, model_store: Path | None) -> bool:
    if model_store is None:
        return False
    # A link in the store is a way into the store, wherever it leads.
    store = model_store.resolve()
    return path.is_relative_to(store) or any(path.is_relative_to(each.resolve()) for each in store.iterdir())


class SnapshotWriter:
    """Writes the snapshots of one instance, and what its guard knows of it; each call may come from another thread."""

    def __init__(
        self, config: Config, registry: Registry, remember: Callable[[dict[str, Any]], None] = lambda models: None
    ) -> None:
        """Writes nothing yet.

        Args:
            config: the configuration; with `no_config_snapshots` no file is ever written.
            registry: the models.
            remember: called with the models after each change, with and without snapshots: a supervisor that follows
                this one has to go on with them. `started` there tells whether all models of the start are among them.
        """
        self._config = config
        self._registry = registry
        self._directory = config.log_dir / "config"
        self._lock = threading.Lock()
        self._enabled = False
        self._not_restored: dict[tuple[str, str], RecordedModel] = {}
        self._remember = remember
        self._started = False

    def keep(self, model: RecordedModel) -> None:
        """Has a model that is not restored (yet) stay in the snapshots, until it is registered."""
        with self._lock:
            self._not_restored[model.name, model.version] = model

    def restored(self, model: RecordedModel) -> None:
        """A model was restored: whether it is in the snapshots is from now on the registry's affair."""
        with self._lock:
            self._not_restored.pop((model.name, model.version), None)

    def start(self) -> None:
        """Writes the startup snapshot; from now on operations are recorded, unless this very file cannot be written."""
        self._started = True
        self._tell_guard()
        if self._config.no_config_snapshots:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # First of all: an operation that ends while the file is written is recorded after it.
            self._enabled = True
            self._write("startup")
        except OSError as error:
            self._enabled = False
            log.error(
                "No snapshots are written, models registered from now on are lost at the next start: %s: %s",
                self._directory,
                error.strerror,
            )

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
                    models[each.name][each.version][_AT_STARTUP] = True
            self._remember({"models": models, "started": self._started})

    def _write(self, occasion: Occasion) -> None:
        with self._lock:
            known = sorted(name for name in os.listdir(self._directory) if _FILE_NAME.fullmatch(name))
            name = f"{_stamp_after(known[-1] if known else None)}-{occasion}.cfg"
            temporary = self._directory / f".new-{os.getpid()}.cfg"
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                with open(os.open(temporary, flags, 0o600), "w", encoding="ascii") as file:
                    file.write(self._content(name))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._directory / name)
                _sync_directory(self._directory)
            finally:
                temporary.unlink(missing_ok=True)
            for old in known[: max(0, len(known) + 1 - KEPT_FILES)]:
                (self._directory / old).unlink(missing_ok=True)

    def _content(self, name: str) -> str:
        models, count = self._models()
        snapshot = {"name": name, "modelCount": count, "created": time.time_ns() // 1_000_000, "models": models}
        # The models first: of a file that was cut off later by hand, that is then missed.
        rows = {"model_snapshot": json.dumps(snapshot, indent=2), "version": TORCHSERVE_VERSION}
        if self._config.config_file is not None:
            rows["tsConfigFile"] = str(self._config.config_file)
        rows |= given_settings(self._config)
        lines = [f"#Saving snapshot\n#{time.strftime('%a %b %d %H:%M:%S %Z %Y')}"]
        return "\n".join([*lines, *(format_property(key, value) for key, value in rows.items()), ""])

    def _models(self) -> tuple[dict[str, dict[str, Any]], int]:
        with self._registry.changed:
            versions = [model for model in self._registry.all_versions() if not model.unloading]
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
        recorded = {
            key: RecordedModel.from_model(model, is_default=key in defaults, config=self._config)
            for model in versions
            for key in [(model.name, model.version)]
        }
        models: dict[str, dict[str, Any]] = {}
        self._not_restored = {key: model for key, model in self._not_restored.items() if key not in recorded}
        everything = self._not_restored | recorded
        for (name, version), model in everything.items():
            models.setdefault(name, {})[version] = model.to_json()
        return models, len(everything)


def given_settings(config: Config) -> dict[str, str]:
    """The settings that are not at their defaults, and the addresses, as text that reads back as the same."""
    default = Config()
    rows = {}
    for key in property_settings():
        value = getattr(config, key)
        if key == "load_models":
            rows[key] = config.initial_models
        elif key != "model_snapshot" and (value != getattr(default, key) or key.endswith("_address")):
            rows[key] = _text(value)
    return {key: text for key, text in rows.items() if text}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _stamp_after(newest: str | None) -> str:
    """The present, local, to the millisecond; later than the newest file's even if the clock was put back."""
    now = datetime.now()
    if newest is not None and newest[:17] >= now.strftime(_STAMP)[:17]:
        try:
            now = datetime.strptime(newest[:17] + "000", _STAMP) + timedelta(milliseconds=1)
        except ValueError:
            log.warning("%s is not a time: the newest snapshot cannot be told by its name; remove that file", newest)
    return now.strftime(_STAMP)[:17]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
