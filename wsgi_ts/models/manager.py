"""What can be done with models: register, scale, set the default version, reload, unregister.

Each operation takes the arguments of the control socket and returns `{"status": HTTP status, "body": JSON}`, word
for word what the REST API answers, or raises a ServerError. Operations on one version of a model follow each
other; those on different ones run side by side, each on the thread of its caller.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.download import Fetchers
from wsgi_ts.archive.model_directory import ModelDirectory, remove_model_directory
from wsgi_ts.errors import (
    BadRequest,
    ConflictStatus,
    ModelNotFound,
    ModelVersionNotFound,
    RequestTimeout,
    ServerError,
    ServiceUnavailable,
)
from wsgi_ts.models.arguments import RegisterArguments, check_count, check_runtime
from wsgi_ts.models.preparation import ModelPreparer, discard
from wsgi_ts.models.recorded import RecordedModel
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.snapshots import SnapshotNotWritten
from wsgi_ts.models.trials import Trials
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.models.workers import Send, WorkerScaler, limit_workers
from wsgi_ts.plugins.events import Events
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)


class ModelManager:
    """The operations on the models of one instance.

    Args:
        send: see WorkerScaler.
        publish: makes the registry's present state known to the data path.
        record: writes the snapshot; called after each change, before it is answered.
        forget: has the snapshots leave out a model that could not be restored; see `SnapshotWriter.forget`.
        events: plugins that are told, and asked; None for none.
        fetchers: plugins that fetch archives; None for none.

    Attributes:
        workers: starts and stops workers, and knows what a restarted batcher has to be told.
        trials: other settings that are tried on a version.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        models_dir: Path,
        *,
        gpus: int,
        send: Send,
        publish: Callable[[], None],
        record: Callable[[], None] = lambda: None,
        forget: Callable[[str, str | None], RecordedModel | None] = lambda name, version: None,
        events: Events | None = None,
        fetchers: Fetchers | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._preparer = ModelPreparer(config, registry, models_dir, gpus, fetchers)
        self._events = events or Events(config, None)
        self.workers = WorkerScaler(registry, gpus, send, publish)
        self._publish = publish
        self._record = record
        self._forget = forget
        self.trials = Trials(config, registry, self.workers, self._operation_on, record)

    def register(
        self, *, at_startup: bool = False, workflow: str = "", shown_name: str = "", fetched: str = "", **given: Any
    ) -> dict[str, Any]:
        """Registers a model and starts its first workers.

        If `synchronous` (the default) it answers when they are ready; if one fails, the model stays without workers, if
        they take too long, it goes.
        The answer has the model's `name`, too, which the archive may have given.
        `given` has fields of RegisterArguments; `at_startup`: the configuration names this model; `workflow`: the
        workflow that it is a node of, so that it is in no snapshot; `shown_name`: `ModelSpec.shown_name`; `fetched`:
        the file that its archive was fetched into at an earlier start.
        """
        self._registry.refuse_while_draining()
        arguments = RegisterArguments.checked(given)
        directory = self._preparer.open(arguments, at_startup=at_startup, fetched=fetched)
        model = self._add(directory, None if at_startup else arguments, workflow, shown_name)
        with model.operation:
            answer = self._start_registered(model, arguments.synchronous)
        if not at_startup:
            self._record_change(workflow)
        return {**answer, "name": model.name}

    def register_functions(
        self,
        workflow: str,
        name: str,
        directory: Path,
        url: str,
        handler: str,
        functions: dict[str, dict[str, Any]],
        *,
        shown: str,
        **given: Any,
    ) -> None:
        """Registers the functions of a workflow, and starts the worker that runs them all.

        Args:
            workflow: the workflow.
            name: what the process of the functions is called as a model; no other model or function is.
            directory: its files.
            url: where they are from.
            handler: the file with the functions.
            functions: `ModelSpec.functions`.
            shown: what the workflow is called to people, where `workflow` is not its name yet.
            given: time-outs, as fields of RegisterArguments.
        """
        self._registry.refuse_while_draining()
        arguments = RegisterArguments.checked({"url": url, **given})
        model = self._preparer.prepare_functions(workflow, name, directory, handler, functions, arguments)
        model.spec = replace(model.spec, shown_name=shown + model.name.removeprefix(workflow))
        try:
            self._registry.add(model)
        except BaseException:
            self._registry.numbers.free_indexes(model.spec)
            raise
        with model.operation:
            self._registry.add_functions(model)
            self._start_registered(model, synchronous=True)

    def restore(self, recorded: RecordedModel) -> None:
        """Registers a model version of a snapshot again, with the numbers recorded there, and starts its workers.

        One whose archive cannot be read any more is registered all the same, without code: it stays visible, and
        `/ping` tells of it, until somebody puts the archive right or unregisters it.

        Raises:
            ServerError: it cannot be registered.
        """
        check_runtime(recorded.runtime)
        model = self._add(self._preparer.reopen(recorded), recorded)
        with model.operation:
            self._start_registered(model, synchronous=False)

    def expect(self, recorded: Sequence[RecordedModel]) -> None:
        """Has the data path know which versions are about to be restored; an empty list when they are."""
        with self._registry.changed:
            self._registry.expect((each.name, each.version, each.is_default) for each in recorded)
            self._publish()

    def scale(
        self,
        *,
        model_name: str,
        version: str | None = None,
        min_worker: int = 1,
        max_worker: int | None = None,
        synchronous: bool = False,
    ) -> dict[str, Any]:
        """Sets how many workers a version, by default the default one, has.

        Workers are started until there are `min_worker`, and stopped until there are no more than `max_worker` (None
        for the same). `synchronous`: it answers when they are ready; status 206 says that some of those that were there
        before are not.
        """
        self._registry.refuse_while_draining()
        most = min_worker if max_worker is None else max_worker
        if most < min_worker:
            raise BadRequest("max_worker cannot be less than min_worker.")
        host = self._host_of(model_name, version)
        self._registry.get(host, version)  # as in TorchServe the client hears of a wrong name first
        check_count("min_worker", min_worker)
        check_count("max_worker", most)
        with self._operation_on(host, version) as model:
            if model.unloading:
                raise ConflictStatus(f"Model version {model.version} of {model_name} is being unregistered")
            model.refuse_while_tried()
            least, most = limit_workers(model.placement, model_name, min_worker, most, self._registry.gpu_holders())
            change = self.workers.set_limits(model, least, most)
            model.is_scaled = bool(model.workflow)
            if not synchronous:
                self._record()
                return _status(202, "Processing worker updates...")
            self.workers.wait_until_ready(model, version, change.started, shown_name=model_name)
            self.workers.wait_until_left(model, change.leaving, self._config.unregister_model_timeout)
            # Workers that have died, and are being started again, are not waited for: that may take for ever.
            is_final = self.workers.ready_count(model) >= least
        self._record()
        if not is_final:
            return _status(206, "Workers scaling in progress...")
        shown = "" if version is None else f", version: {version}"
        return _status(200, f"Workers scaled to {min_worker} for model: {model_name}{shown}")

    def set_default(self, *, model_name: str, version: str) -> dict[str, Any]:
        """Makes a version the one that requests without a version go to."""
        self._registry.refuse_while_draining()
        with self._registry.changed:
            host = self._host_of(model_name, version)
            if host == model_name:
                self._registry.set_default(model_name, version)
            self._publish()
            workflow = self._registry.get(host, version).workflow
        self._record_change(workflow)
        return _status(200, f'Default version successfully updated for model "{model_name}" to "{version}"')

    def unregister(self, *, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Takes a version off the data path, and waits until its workers are gone."""
        self._registry.refuse_while_draining()
        with self._registry.changed:
            if self._host_of(model_name, version) != model_name:
                self._registry.remove_function(model_name)
                self._publish()
                return _status(200, f'Model "{model_name}" unregistered')
        if self._leave_out(model_name, version):
            self._record()
            return _status(200, f'Model "{model_name}" unregistered')
        with self._operation_on(model_name, version) as model:
            self._registry.begin_removal(model.name, model.version)
            if not self._remove(model):
                raise RequestTimeout(f"Timed out while cleaning resources: {model_name}")
        log.info("Model %s version %s unregistered", model.name, model.version)
        self._events.tell("model_unregistered", name=model.name, version=model.version)
        self._record_change(model.workflow)
        return _status(200, f'Model "{model_name}" unregistered')

    def _leave_out(self, name: str, version: str | None) -> bool:
        """Has the snapshots leave out a version that could not be restored; false where it is registered.

        Raises:
            ModelNotFound: no such model.
            ModelVersionNotFound: no such version.
            ConflictStatus: its turn is still to come.
        """
        try:
            self._registry.get(name, version)
            return False
        except (ModelNotFound, ModelVersionNotFound):
            if self._registry.is_expected(name, version):
                raise ConflictStatus(f"Model {name} is being restored; try again when that is done.") from None
            record = self._forget(name, version)
            if record is None:
                raise
        log.info("Model %s version %s, which could not be restored, is left out from now on", name, record.version)
        if record.downloaded and self._config.model_store is not None:
            archive = self._config.model_store / record.archive
            if archive not in (model.directory.archive for model in self._registry.all_versions()):
                archive.unlink(missing_ok=True)
        return True

    def _record_change(self, workflow: str) -> None:
        """Has a change of a version recorded, unless it is a node of a workflow: of those only scaling is."""
        if not workflow:
            self._record()

    def reload(self, model: ModelVersion) -> None:
        """Replaces the workers of a version by ones that load its files as they are now; no request is lost.

        Its numbers stay as they were registered; all of it stays where a new worker does not get ready.

        Raises:
            ServerError: it stays as it was; the text says why.
        """
        with self._operation_on(model.name, model.version) as there_now:
            if there_now is not model or model.unloading:
                return
            model.refuse_while_tried()
            recorded = RecordedModel.from_model(model, is_default=False, config=self._config)
            fresh = self._preparer.reread(recorded, model.spec.index)
            try:
                leaving = self.workers.replace(model, fresh.spec)
            except ServerError:
                remove_model_directory(fresh.directory)
                raise
            self.workers.wait_until_left(model, leaving, self._config.unregister_model_timeout)
            old, model.directory, model.yaml = model.directory, fresh.directory, fresh.yaml
            remove_model_directory(old)

    def _host_of(self, name: str, version: str | None) -> str:
        """The model whose workers answer for a name: a function's host, or itself.

        Raises:
            ModelVersionNotFound: it is a function, and has another version than this one.
        """
        host = self._registry.function_host(name, version)
        return name if host is None else host.name

    @contextmanager
    def _operation_on(self, name: str, version: str | None) -> Iterator[ModelVersion]:
        """A version, the default one where none is named, with which nobody else does anything meanwhile."""
        model = self._registry.get(name, version)
        while True:
            with model.operation:
                # Whoever was before us may have unregistered it, and even registered another one in its place.
                there_now = self._registry.get(name, model.version)
                if there_now is model:
                    yield model
                    return
            model = there_now

    def _add(
        self,
        directory: ModelDirectory,
        said: RegisterArguments | RecordedModel | None,
        workflow: str = "",
        shown_name: str = "",
    ) -> ModelVersion:
        """Adds the version in an unpacked archive to the registry; where that fails, nothing of it is left.

        `said` is what the register call or a snapshot says of it; None for a model of the configuration. `workflow` is
        the workflow that it is a node of, `shown_name` its `ModelSpec.shown_name`.
        """
        recorded = said if isinstance(said, RecordedModel) else None
        model: ModelVersion | None = None
        try:
            model = self._preparer.prepare(directory, said)
            model.workflow = workflow
            model.spec = replace(model.spec, shown_name=shown_name)
            model.loaded_at_startup = recorded.at_startup if recorded is not None else said is None
            self._events.ask_model_registering(name=model.name, version=model.version, url=directory.url)
            self._registry.add(model)
        except BaseException as error:
            if model is not None:
                self._registry.numbers.free_indexes(model.spec)
            # A snapshot's model keeps its archive: the next start tries it again. One that is good but registered
            # already stays in the store, as in TorchServe: it can be registered by its name there.
            keeps = recorded is not None or isinstance(error, ConflictStatus)
            discard(replace(directory, downloaded=None) if keeps else directory)
            raise
        return model

    def _start_registered(self, model: ModelVersion, synchronous: bool) -> dict[str, Any]:
        wanted = model.spec.min_workers
        named = f'Model "{model.name}" Version: {model.version} registered with'
        log.info("Model %s version %s registered from %s", model.name, model.version, model.directory.url)
        self._events.tell("model_registered", name=model.name, version=model.version, url=model.directory.url)
        started = self.workers.set_limits(model, wanted, model.spec.max_workers).started
        if wanted == 0:
            return _status(200, f"{named} 0 initial workers. Use scale workers API to add workers for the model.")
        if not synchronous:
            return _status(202, "Processing worker updates...")
        try:
            self.workers.wait_until_ready(model, model.version, started)
        except ServiceUnavailable:
            # The server stops before anybody knows whether they start: the call is undone.
            self._undo(model)
            raise
        except ServerError:
            # As in TorchServe: a model whose workers fail stays, without them; one whose workers take too long goes.
            if self.workers.has_timed_out(model) and not model.workflow:
                self._undo(model)
                raise
            leaving = self.workers.set_limits(model, 0, 0).leaving
            self.workers.wait_until_left(model, leaving, self._config.unregister_model_timeout)
            # The answer is that the workers failed, whatever becomes of the snapshot; the log tells of that.
            with contextlib.suppress(SnapshotNotWritten):
                self._record_change(model.workflow)
            raise
        return _status(200, f"{named} {wanted} initial workers")

    def _undo(self, model: ModelVersion) -> None:
        """Takes a version away whose registration has come to nothing."""
        model.unloading = True
        self._remove(model)
        log.info("Model %s version %s unregistered", model.name, model.version)
        self._events.tell("model_unregistered", name=model.name, version=model.version)

    def _remove(self, model: ModelVersion) -> bool:
        """Ends a version that is off the data path; false if its batchers did not let go of it in time."""
        with self._registry.changed:
            if not self.workers.unload(model, self._config.unregister_model_timeout):
                return False
            self._registry.remove(model)
            self._publish()
            directory = self._without_shared_archive(model.directory)
        discard(directory)
        return True

    def _without_shared_archive(self, removed: ModelDirectory) -> ModelDirectory:
        """Leaves a removed version's downloaded archive to another version made from it, and goes with it then.

        Returns the removed version's files, without an archive that is still needed: a snapshot is restored from it.
        """
        for model in self._registry.all_versions():
            if removed.downloaded is not None and model.directory.archive == removed.downloaded:
                model.directory = replace(model.directory, downloaded=removed.downloaded)
                return replace(removed, downloaded=None)
        return removed


def _status(code: int, text: str) -> dict[str, Any]:
    return {"status": code, "body": {"status": text}}
