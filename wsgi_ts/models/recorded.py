"""The model versions that a snapshot, or the guard of a supervisor that has died, holds: what is restored from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from wsgi_ts.archive.manifest import check_name
from wsgi_ts.errors import BadRequest
from wsgi_ts.models.model_yaml import ModelYaml
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.conversion import to_boolean, to_text, to_whole_number
from wsgi_ts.settings.model_entries import convert_entry, known_runtime
from wsgi_ts.settings.sources import SNAPSHOT_NAME

#: What only our snapshots say of a model.
_OURS: Mapping[str, Callable[[Any], Any]] = {
    "directory": to_text,
    "handler": to_text,
    "downloaded": to_boolean,
    "atStartup": to_boolean,
    "batchPolicy": to_text,
    "threadsPerWorker": to_whole_number,
}
#: What `wsgi-ts tune --apply` may have set besides those numbers: JSON key, field of ModelSpec.
_TUNED = {"batchPolicy": "batch_policy", "threadsPerWorker": "threads_per_worker"}
#: Numbers of a recorded model: JSON key, field of ModelSpec, least value.
_NUMBERS = {
    "minWorkers": ("min_workers", 0),
    "maxWorkers": ("max_workers", 0),
    "batchSize": ("batch_size", 1),
    "maxBatchDelay": ("max_batch_delay_ms", 0),
    "responseTimeout": ("response_timeout_s", 0),
    "startupTimeout": ("startup_timeout_s", 0),
}


class SnapshotError(Exception):
    """A snapshot from which no instance can be started; the message says which and why, on one line."""


@dataclass(frozen=True, slots=True)
class RecordedModel:
    """One model version of a snapshot; None where the snapshot says nothing.

    Attributes:
        is_default: whether it was the default version.
        archive: its archive's name in the model store.
        directory: the directory that it was used in place from, where that is not in the model store.
        downloaded: whether the archive was fetched for it, and goes with it when it is unregistered.
        handler: the handler that was given in place of the manifest's.
        runtime: `python` or `python3`.
        at_startup: the configuration named it; only in the record that the guard keeps.
        numbers: what else is recorded, by the names of ModelSpec: delays in milliseconds, time-outs in seconds.
        tuned: the same for what `wsgi-ts tune --apply` has set and the archive says otherwise.
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
    numbers: Mapping[str, int] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it is registered from."""
        return self.directory or self.archive

    @classmethod
    def from_model(cls, model: ModelVersion, *, is_default: bool, config: Config) -> RecordedModel:
        """What is to be recorded of a registered version."""
        kept, directory = model.kept, model.directory
        spec = kept.spec
        wanted = {"min_workers": kept.min_workers, "max_workers": kept.max_workers}
        named = directory.manifest.handler or config.default_service_handler or ""
        in_place = not directory.extracted and not _is_in_store(directory.path, config.model_store)
        yaml = model.yaml or ModelYaml()
        of_archive = {
            "batch_policy": yaml.batch_policy or config.batch_policy,
            "threads_per_worker": yaml.threads_per_worker,
        }
        tuned = {} if spec.functions else {name: getattr(spec, name) for name in _TUNED.values()}
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
            numbers={name: int(wanted.get(name, getattr(spec, name))) for name, _ in _NUMBERS.values()},
            tuned={name: value for name, value in tuned.items() if value != of_archive[name]},
        )

    @classmethod
    def from_json(cls, name: str, version: str, fields: Any) -> RecordedModel:
        """Reads one version's entry; raises ValueError where something in it makes no sense."""
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
            at_startup=ours.get("atStartup", False),
            # TorchServe records numbers as they were given, such as a delay of -10000 ms for "do not wait".
            numbers={name: max(least, entry[key]) for key, (name, least) in _NUMBERS.items() if key in entry},
            tuned={name: ours[key] for key, name in _TUNED.items() if key in ours},
        )

    def to_json(self) -> dict[str, Any]:
        """The entry: TorchServe's keys, then ours where they say something."""
        entry: dict[str, Any] = {"defaultVersion": self.is_default, "marName": self.archive}
        entry |= {key: self.numbers.get(name) for key, (name, _) in _NUMBERS.items()}
        tuned = {key: self.tuned.get(name) for key, name in _TUNED.items()}
        ours = {**tuned, "directory": self.directory, "handler": self.handler, "downloaded": self.downloaded or None}
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
        if file is not None and SNAPSHOT_NAME.fullmatch(file.name):
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
    """The models of a snapshot, or of the guard's record; raises ValueError where something makes no sense."""
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
