"""The registry: models, versions, the default version, the workers wanted, and what the data path may know.

The supervisor alone writes it. It starts nothing and waits for nothing: the manager carries out operations.
All methods may be called from any thread; `changed` wakes those who wait for a worker or for a model's end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from wsgi_ts.errors import (
    ConflictStatus,
    InvalidModelVersion,
    ModelNotFound,
    ModelVersionNotFound,
    ServiceUnavailable,
)
from wsgi_ts.messages import WorkerReport, WorkerState
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.models.workflow_table import WorkflowTable, fetched_archives, scaled_nodes


class Registry:
    """All models of one instance.

    Args:
        numbers: gives versions and workers their numbers.
        clear_workflow: removes what earlier owners of a workflow's number have counted under it.

    Attributes:
        numbers: as it was given.
        changed: a condition on the registry's lock; notified after every report of a batcher.
        draining: the instance is stopping.
        leaving: it will be stopping; it serves on, and says that it is not ready.
        announced: all its processes serve, and the models of the start are registered.
        started: each of those has had a ready worker, or has failed to load.
    """

    def __init__(self, numbers: Numbers, clear_workflow: Callable[[int], None] = lambda index: None) -> None:
        self.numbers = numbers
        self.changed = threading.Condition(threading.RLock())
        self.workflows = WorkflowTable(self.changed, clear_workflow)
        self.draining = False
        self.leaving = False
        self.announced = False
        self.started = False
        self._models: dict[str, dict[str, ModelVersion]] = {}
        self._defaults: dict[str, str] = {}
        self._expected: dict[str, dict[str, bool]] = {}
        self._functions: dict[str, tuple[ModelVersion, str]] = {}
        self._aliases: dict[str, str] = {}

    def refuse_while_draining(self) -> None:
        """Raises ServiceUnavailable while the instance stops: nobody begins an operation then."""
        if self.draining or self.leaving:
            raise ServiceUnavailable("The server is stopping.")

    def gpu_holders(self) -> dict[int, list[str]]:
        """For each GPU that has any, its workers, for people."""
        holders: dict[int, list[str]] = {}
        with self.changed:
            for model in self.all_versions():
                for worker in model.workers.values():
                    for gpu in worker.gpus:
                        holders.setdefault(gpu, []).append(f"{model.name} {model.version} worker {worker.worker_id}")
        return holders

    def check_absent(self, name: str, version: str) -> None:
        """Raises ConflictStatus where a version, or a function of that name, is there already."""
        with self.changed:
            if version in self._models.get(name, {}) or name in self._functions:
                raise ConflictStatus(f"Model version {version} is already registered for model {name}")

    def add(self, model: ModelVersion) -> None:
        """Adds a version, the first of a model as its default one; raises ConflictStatus where it is there already."""
        with self.changed:
            self.check_absent(model.name, model.version)
            self._models.setdefault(model.name, {})[model.version] = model
            self._defaults.setdefault(model.name, model.version)

    def add_functions(self, host: ModelVersion) -> None:
        """Makes the functions of a version known, or none: raises ConflictStatus where a name is taken."""
        with self.changed:
            names = {function["model"]: key for key, function in host.spec.functions.items()}
            for name in names:
                if name in self._models or name in self._functions:
                    raise ConflictStatus(f"Model version {host.version} is already registered for model {name}")
            self._functions |= {name: (host, key) for name, key in names.items()}

    def function_host(self, name: str, version: str | None = None) -> ModelVersion | None:
        """The version whose workers run the function of this name; None where it is no function's.

        Raises:
            ModelVersionNotFound: the function has another version than this one.
        """
        with self.changed:
            found = self._functions.get(name)
            if found is None:
                return None
            if version not in (None, found[0].version):
                raise ModelVersionNotFound.named(name, str(version))
            return found[0]

    def remove_function(self, name: str) -> None:
        """Forgets a function; its host stays."""
        with self.changed:
            self._functions.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether a model or a function has this name."""
        with self.changed:
            return name in self._models or name in self._functions

    def rename(self, old: str, new: str) -> None:
        """Gives a model, with all its versions, or a function another name, which none has.

        Nothing happens where there is no model of the old name.
        """
        with self.changed:
            if old in self._functions:
                host, key = self._functions.pop(old)
                self._functions[new] = host, key
                functions = {**host.spec.functions, key: {**host.spec.functions[key], "model": new}}
                host.spec = replace(host.spec, functions=functions)
            if old in self._models:
                self._models[new] = self._models.pop(old)
                self._defaults[new] = self._defaults.pop(old)
                for model in self._models[new].values():
                    model.spec = replace(model.spec, name=new)

    def alias(self, alias: str, name: str) -> None:
        """Lets requests that name a model as it was called before find it by its present name."""
        with self.changed:
            self._aliases[alias] = name

    def remove_aliases(self, names: Iterable[str]) -> None:
        """Forgets names that models had before."""
        with self.changed:
            for name in names:
                self._aliases.pop(name, None)

    def nodes_of(self, workflow: str) -> list[ModelVersion]:
        """The versions that a workflow has registered, its functions' host among them."""
        return [model for model in self.all_versions() if model.workflow == workflow]

    def workflow_records(self) -> dict[str, dict[str, Any]]:
        """What the next start has to know of each workflow: how it was registered, and how its nodes were scaled.

        What was fetched for its nodes is in the model store until the workflow is unregistered.
        """
        with self.changed:
            records = self.workflows.records()
            for name, key in self.workflows.keys().items():
                nodes = self.nodes_of(key)
                if scaled := scaled_nodes(name, key, nodes):
                    records[name] = {**records[name], "scaled": scaled}
                if fetched := fetched_archives(name, key, nodes):
                    records[name] = {**records[name], "fetchedModels": fetched}
            return records

    def is_expected(self, name: str, version: str | None) -> bool:
        """Whether a version, or without one any of the model, is about to be restored."""
        with self.changed:
            versions = self._expected.get(name, {})
            return bool(versions) if version is None else version in versions

    def expect(self, versions: Iterable[tuple[str, str, bool]]) -> None:
        """Has the data path know of versions that are about to be restored: it answers 503 for them, and not 404.

        Each is name, version, and whether it was the default one; those of an earlier call are forgotten.
        """
        with self.changed:
            self._expected = {}
            for name, version, is_default in versions:
                self._expected.setdefault(name, {})[version] = is_default

    def get(self, name: str, version: str | None = None) -> ModelVersion:
        """A version of a model; the default one where none is named.

        Raises:
            ModelNotFound: no such model.
            ModelVersionNotFound: no such version.
        """
        with self.changed:
            versions = self.versions_of(name)
            wanted = self._defaults[name] if version is None else version
            if wanted not in versions:
                raise ModelVersionNotFound.named(name, wanted)
            return versions[wanted]

    def versions_of(self, name: str) -> dict[str, ModelVersion]:
        """All versions of a model, in the order of their registration; raises ModelNotFound where there is none."""
        with self.changed:
            if name not in self._models:
                raise ModelNotFound.named(name)
            return dict(self._models[name])

    def default_versions(self) -> list[ModelVersion]:
        """The default version of every model, sorted by name."""
        with self.changed:
            return [self._models[name][self._defaults[name]] for name in sorted(self._models)]

    def all_versions(self) -> list[ModelVersion]:
        """Every version of every model."""
        with self.changed:
            return [model for versions in self._models.values() for model in versions.values()]

    def set_default(self, name: str, version: str) -> None:
        """Makes a version the default one.

        Raises:
            ModelNotFound: no such model.
            ModelVersionNotFound: no such version.
        """
        with self.changed:
            if version not in self.versions_of(name):
                raise ModelVersionNotFound(f"Model version {version} does not exist for model {name}")
            self._defaults[name] = version

    def begin_removal(self, name: str, version: str | None = None) -> ModelVersion:
        """Takes a version away from the data path; `remove` ends it.

        Raises:
            ModelNotFound: no such model.
            ModelVersionNotFound: no such version.
            InvalidModelVersion: it is the default version, and there are others.
        """
        with self.changed:
            model = self.get(name, version)
            if len(self._models[name]) > 1 and self._defaults[name] == model.version:
                raise InvalidModelVersion(f"Cannot remove default version for model {name}")
            model.unloading = True
            return model

    def remove(self, model: ModelVersion) -> None:
        """Forgets a version and gives its number back; nothing happens if it was forgotten before."""
        with self.changed:
            versions = self._models.get(model.name, {})
            if versions.get(model.version) is not model:
                return
            del versions[model.version]
            for name in [name for name, (host, _) in self._functions.items() if host is model]:
                del self._functions[name]
            if not versions:
                del self._models[model.name]
                del self._defaults[model.name]
            elif self._defaults[model.name] == model.version:
                # Only a failed registration comes here: its model has got a second version meanwhile.
                self._defaults[model.name] = next(iter(versions))
            self.numbers.free_indexes(model.spec)
            self.changed.notify_all()

    def by_index(self, index: int) -> ModelVersion | None:
        """The version with a number on the data path."""
        with self.changed:
            return next((model for model in self.all_versions() if model.spec.index == index), None)

    def apply_report(self, batcher: int, report: WorkerReport) -> bool:
        """Notes what a batcher says of a worker; returns whether the data path has to know of it."""
        with self.changed:
            model = self.by_index(report.model_index)
            if model is None:
                return False
            known = self._routing_state(model)
            if report.state == WorkerState.STOPPED:
                model.leaving.pop(report.worker_id, None)
            worker = model.workers.get(report.worker_id) or model.leaving.get(report.worker_id)
            if worker is not None:
                # Without a report its batcher is new, and counts anew.
                before = worker.report.restarts if worker.report is not None else 0
                if report.restarts > before:
                    model.restarts[report.restart_reason] += report.restarts - before
                worker.report = report
            if batcher in model.loaded_in:
                model.accepted_in.add(batcher)
            self.changed.notify_all()
            return self._routing_state(model) != known

    def batcher_lost(self, batcher: int) -> None:
        """Forgets all that a dead batcher has said; its workers are dead too."""
        with self.changed:
            for model in self.all_versions():
                for worker in model.workers_in(batcher):
                    worker.report = None
                model.leaving = {key: each for key, each in model.leaving.items() if each.batcher != batcher}
                if model.unloading:
                    model.loaded_in.discard(batcher)
            self.changed.notify_all()

    def is_healthy(self, now: float) -> bool:
        """Whether every model has the workers it should have at the monotonic time `now`."""
        return all(model.is_healthy(now) for model in self.default_versions() if not model.unloading)

    def note_start(self) -> None:
        """Looks whether the start is complete; once it is, it stays so."""
        with self.changed:
            first = [model for model in self.all_versions() if model.loaded_at_startup]
            self.started = self.started or (self.announced and not any(model.is_pending for model in first))

    @property
    def is_pending(self) -> bool:
        """Whether a model has no ready worker yet, but will have one."""
        with self.changed:
            return any(model.is_pending for model in self.all_versions() if not model.unloading)

    @property
    def is_ready(self) -> bool:
        """Whether the instance is to be sent requests.

        One model that does not work, beside others that do, is no reason to send none; each has a path that tells.
        """
        with self.changed:
            wanted = [each for each in self.default_versions() if each.min_workers > 0 and not each.unloading]
            can_answer = not wanted or any(model.is_ready for model in wanted)
            return self.started and can_answer and not (self.draining or self.leaving)

    def routes(self, epoch: int, now: float) -> dict[str, Any]:
        """What the data path has to know at the monotonic time `now`, as it is published under the number `epoch`."""
        with self.changed:
            defaults = {model.name: model for model in self.default_versions()}
            routed = [name for name, model in defaults.items() if not model.unloading and not model.spec.functions]
            models = {
                **{name: _expected_routes(versions) for name, versions in self._expected.items()},
                **{name: self._model_routes(name) for name in routed},
                **{name: self._function_routes(*found) for name, found in self._functions.items()},
            }
            models |= {alias: models[name] for alias, name in self._aliases.items() if name in models}
            return {
                "epoch": epoch,
                "healthy": self.is_healthy(now),
                "started": self.started,
                "ready": self.is_ready,
                "draining": self.draining or self.leaving,
                "models": models,
                "workflows": self.workflows.routes(),
            }

    def _function_routes(self, host: ModelVersion, function: str) -> dict[str, Any]:
        entry = {**host.routes(), "function": function, "row": host.spec.functions[function]["row"]}
        return {"default": host.version, "startup": False, "versions": {host.version: entry}}

    def _model_routes(self, name: str) -> dict[str, Any]:
        return {
            "default": self._defaults[name],
            "startup": any(model.loaded_at_startup for model in self._models[name].values()),
            "versions": {
                **_expected_routes(self._expected.get(name, {}))["versions"],
                **{version: model.routes() for version, model in self._models[name].items() if not model.unloading},
            },
        }

    def _routing_state(self, model: ModelVersion) -> tuple[set[int], bool]:
        return set(model.accepted_in), model.is_ready


def _expected_routes(versions: Mapping[str, bool]) -> dict[str, Any]:
    """The routes of versions without a worker; which of them was the default one is said by True."""
    nowhere: dict[str, Any] = {"index": 0, "batchers": {}, "client_timeout_ms": 0}
    nowhere |= {"continuous": False, "sequences": False, "loaded": False}
    default = next((version for version, is_default in versions.items() if is_default), next(iter(versions), ""))
    return {"default": default, "startup": False, "versions": dict.fromkeys(versions, nowhere)}
