"""What can be done with models: register, scale, describe, list, set the default version, unregister.

Each operation takes the arguments of the control socket and returns `{"status": HTTP status, "body": JSON}`, word
for word what the REST API answers, or raises a ServerError. Operations on one version of a model follow each
other; those on different ones run side by side, each on the thread of its caller.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.errors import (
    BadRequest,
    ConflictStatus,
    InternalServerError,
    InvalidModel,
    OutOfResources,
    RequestTimeout,
    ServerError,
    ServiceUnavailable,
)
from wsgi_ts.gpu.assign import Assigner, group_devices
from wsgi_ts.messages import LoadModel, SetWorkers, ToBatcher, UnloadModel, WantedWorker
from wsgi_ts.models.description import describe_version
from wsgi_ts.models.model_yaml import EffectiveSettings, RegisterArguments
from wsgi_ts.models.preparation import (
    ModelPreparer,
    check_arguments,
    check_count,
    check_runtime,
    discard,
    limit_workers,
)
from wsgi_ts.models.registry import ModelVersion, ModelWorker, Registry
from wsgi_ts.models.snapshots import RecordedModel, SnapshotNotWritten
from wsgi_ts.settings.config import Config

log = logging.getLogger(__name__)

#: On top of the model's own startup time-out: a process's start, and the worker template's.
_START_MARGIN_S = 240.0
#: How long an answer waits for the batcher to know the model, so that the next request finds it.
_ACCEPT_LIMIT_S = 2.0
_MAX_PAGE = 100
_OUT_OF_MEMORY = 507
#: To a batcher (its index): one message of the supervisor; never blocks.
Send = Callable[[int, ToBatcher], None]


class ModelManager:
    """The operations on the models of one instance."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        models_dir: Path,
        *,
        gpus: int,
        send: Send,
        publish: Callable[[], None],
        queued: Callable[[ModelVersion], int],
        record: Callable[[], None] = lambda: None,
    ) -> None:
        """Puts the parts together.

        Args:
            config: the configuration.
            registry: what is registered.
            models_dir: where archives are unpacked.
            gpus: GPUs that models may use.
            send: takes a message to a batcher; dropped where that batcher is being restarted (see `replay`).
            publish: makes the registry's present state known to the data path.
            queued: how many requests of a version wait.
            record: writes the snapshot; called after each change, before it is answered.
        """
        self._config = config
        self._registry = registry
        self._preparer = ModelPreparer(config, registry, models_dir, gpus)
        self._assigner = Assigner(gpus)
        self._send = send
        self._publish = publish
        self._queued = queued
        self._record = record
        self._version_locks = _KeyedLocks()

    # Operations

    def register(
        self,
        *,
        url: str | None = None,
        model_name: str | None = None,
        handler: str | None = None,
        runtime: str | None = None,
        synchronous: bool = True,
        s3_sse_kms: bool = False,
        at_startup: bool = False,
        batch_size: int | None = None,
        max_batch_delay: int | None = None,
        initial_workers: int | None = None,
        response_timeout: int | None = None,
        startup_timeout: int | None = None,
    ) -> dict[str, Any]:
        """Registers a model and starts its first workers.

        Args:
            url: the archive.
            model_name: in place of the manifest's.
            handler: in place of the manifest's.
            runtime: in place of the manifest's.
            synchronous: answer when the workers are ready; if one fails, the model stays without workers.
            s3_sse_kms: the object in S3 is encrypted with a key of KMS.
            at_startup: the configuration names this model.
            batch_size: most requests in one call of the handler.
            max_batch_delay: longest wait for a batch to fill, in milliseconds.
            initial_workers: workers to start at once.
            response_timeout: longest run of the handler, in seconds.
            startup_timeout: longest start of a worker, in seconds.
        """
        self._refuse_while_draining()
        if url is None:
            raise BadRequest("Parameter url is required.")
        check_runtime(runtime)
        arguments = RegisterArguments(
            batch_size=batch_size,
            max_batch_delay=max_batch_delay,
            initial_workers=initial_workers,
            response_timeout=response_timeout,
            startup_timeout=startup_timeout,
        )
        check_arguments(arguments)
        directory = self._preparer.open(url, model_name, at_startup=at_startup, s3_sse_kms=s3_sse_kms)
        model, wanted = self._add(directory, None if at_startup else arguments, handler, runtime)
        with self._version_locks.hold((model.name, model.version)):
            answer = self._start_registered(model, wanted, synchronous)
        if not at_startup:
            self._record()
        return answer

    def restore(self, recorded: RecordedModel) -> None:
        """Registers a model version of a snapshot again, with the numbers recorded there, and starts its workers.

        One whose archive cannot be read any more is registered all the same, without code: it stays visible, and
        `/ping` tells of it, until somebody puts the archive right or unregisters it.

        Args:
            recorded: the version; its archive has been there a moment ago.

        Raises:
            ServerError: it cannot be registered.
        """
        check_runtime(recorded.runtime)
        try:
            directory = self._preparer.reopen(recorded)
        except InvalidModel as error:
            log.error(
                "The archive %s of model %s cannot be read (%s): no worker of it will start",
                recorded.url,
                recorded.name,
                error.message,
            )
            directory = self._preparer.empty(recorded)
        if directory.manifest.model_version != recorded.version:
            log.warning(
                "Model %s: the snapshot has version %s, its archive %s now has version %s",
                recorded.name,
                recorded.version,
                recorded.url,
                directory.manifest.model_version,
            )
        model, wanted = self._add(directory, None, recorded.handler, recorded.runtime, recorded)
        with self._version_locks.hold((model.name, model.version)):
            self._start_registered(model, wanted, synchronous=False)

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
        """Sets how many workers a version has.

        Args:
            model_name: the model.
            version: the version; None for the default one.
            min_worker: start workers until there are so many.
            max_worker: stop workers until there are no more than so many; None for `min_worker`.
            synchronous: answer when they are ready.
        """
        self._refuse_while_draining()
        most = min_worker if max_worker is None else max_worker
        if most < min_worker:
            raise BadRequest("max_worker cannot be less than min_worker.")
        check_count("min_worker", min_worker)
        check_count("max_worker", most)
        model = self._registry.get(model_name, version)
        with self._version_locks.hold((model.name, model.version)):
            model = self._registry.get(model.name, model.version)
            if model.unloading:
                raise ConflictStatus(f"Model version {model.version} of {model_name} is being unregistered")
            least, most = limit_workers(model.placement, model.name, min_worker, most, self._registry.gpu_holders())
            leaving = self._set_limits(model, least, most)
            if not synchronous:
                self._record()
                return _status(202, "Processing worker updates...")
            self._wait_for_workers(model, version)
            self._wait_until_left(model, leaving)
        self._record()
        shown = "" if version is None else f", version: {version}"
        return _status(200, f"Workers scaled to {min_worker} for model: {model_name}{shown}")

    def describe(self, *, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Describes one version, the default one, or with `all` every one."""
        with self._registry.changed:
            if version == "all":
                models = list(self._registry.versions_of(model_name).values())
            else:
                models = [self._registry.get(model_name, version)]
            # Taken here, described without the lock: asking for a GPU's load takes a while.
            found = [(model, list(model.workers.values())) for model in models]
        body = [describe_version(model, workers, self._queued(model)) for model, workers in found]
        return {"status": 200, "body": body}

    def list_models(self, *, limit: int | None = None, next_page_token: int | None = None) -> dict[str, Any]:
        """Lists the default versions, a page at a time."""
        size = limit if limit is not None and 0 <= limit <= _MAX_PAGE else _MAX_PAGE
        start = max(0, next_page_token or 0)
        models = self._registry.default_versions()
        body: dict[str, Any] = {}
        if start + size <= len(models):
            body["nextPageToken"] = str(start + size)
        page = models[start : start + size]
        body["models"] = [{"modelName": each.name, "modelUrl": each.directory.url} for each in page]
        return {"status": 200, "body": body}

    def set_default(self, *, model_name: str, version: str) -> dict[str, Any]:
        """Makes a version the one that requests without a version go to."""
        self._refuse_while_draining()
        with self._registry.changed:
            self._registry.set_default(model_name, version)
            self._publish()
        self._record()
        message = f'Default version successfully updated for model "{model_name}" to "{version}"'
        return _status(200, message)

    def unregister(self, *, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Takes a version off the data path, and waits until its workers are gone."""
        self._refuse_while_draining()
        found = self._registry.get(model_name, version)
        with self._version_locks.hold((found.name, found.version)):
            with self._registry.changed:
                model = self._registry.begin_removal(found.name, found.version)
            if not self._remove(model, self._config.unregister_model_timeout):
                raise RequestTimeout(f"Timed out while cleaning resources: {model_name}")
        log.info("Model %s version %s unregistered", model.name, model.version)
        self._record()
        return _status(200, f'Model "{model_name}" unregistered')

    def kserve_ready(self, *, model_name: str) -> dict[str, Any]:
        """Whether a model has workers, as KServe asks it."""
        model = self._registry.get(model_name)
        return {"status": 200, "body": {"name": model_name, "ready": bool(model.workers)}}

    def status(self) -> dict[str, Any]:
        """The tables `models` and `workers` of `wsgi-ts status`."""
        with self._registry.changed:
            versions = self._registry.all_versions()
            defaults = {(model.name, model.version) for model in self._registry.default_versions()}
            models = [
                {
                    "model": model.name,
                    "version": model.version,
                    "default": (model.name, model.version) in defaults,
                    "workers": len(model.workers),
                    "ready": sum(worker.is_ready for worker in model.workers.values()),
                    "queued": self._queued(model),
                }
                for model in versions
            ]
            workers = [
                {
                    "worker": worker.worker_id,
                    "model": f"{model.name} {model.version}",
                    "batcher": worker.batcher,
                    "gpu": worker.gpu_id,
                    "state": worker.report.state if worker.report is not None else "starting",
                    "pid": worker.report.pid if worker.report is not None else -1,
                    "restarts": worker.report.restarts if worker.report is not None else 0,
                    "last_end": worker.report.exit_reason if worker.report is not None else "",
                }
                for model in versions
                for worker in model.workers.values()
            ]
        return {"models": models, "workers": workers}

    # What the supervisor tells

    def replay(self, batcher: int) -> list[ToBatcher]:
        """The messages that tell a restarted batcher what it has to know. Call with the registry's lock held."""
        messages: list[ToBatcher] = []
        for model in self._registry.all_versions():
            if batcher in model.loaded_in and not model.unloading:
                messages.append(LoadModel(model.spec))
                messages.append(_workers_message(model, batcher))
        return messages

    def model_unloaded(self, batcher: int, index: int) -> None:
        """A batcher has nothing of a version any more."""
        with self._registry.changed:
            model = self._registry.by_index(index)
            if model is not None:
                model.loaded_in.discard(batcher)
                self._registry.changed.notify_all()

    # Registering

    def _add(
        self,
        directory: ModelDirectory,
        arguments: RegisterArguments | None,
        handler: str | None,
        runtime: str | None,
        recorded: RecordedModel | None = None,
    ) -> tuple[ModelVersion, EffectiveSettings]:
        """Adds the version in an unpacked archive to the registry; where that fails, nothing of it is left.

        Args:
            directory: the archive.
            arguments: numbers of the register call; None for a model of the configuration or of a snapshot.
            handler: in place of the manifest's.
            runtime: in place of the manifest's.
            recorded: what the snapshot says of it.
        """
        model: ModelVersion | None = None
        try:
            model, wanted = self._preparer.prepare(
                directory, arguments, handler=handler, runtime=runtime, recorded=recorded
            )
            model.loaded_at_startup = recorded.at_startup if recorded is not None else arguments is None
            self._registry.add(model)
        except BaseException:
            if model is not None:
                self._registry.free_index(model.spec.index)
            # A snapshot's model keeps its archive: the next start tries it again.
            discard(directory if recorded is None else replace(directory, downloaded=None))
            raise
        return model, wanted

    def _start_registered(self, model: ModelVersion, settings: EffectiveSettings, synchronous: bool) -> dict[str, Any]:
        named = f'Model "{model.name}" Version: {model.version} registered with'
        log.info("Model %s version %s registered from %s", model.name, model.version, model.directory.url)
        self._set_limits(model, settings.min_workers, settings.max_workers)
        if settings.min_workers == 0:
            text = f"{named} 0 initial workers. Use scale workers API to add workers for the model."
            return _status(200, text)
        if not synchronous:
            return _status(202, "Processing worker updates...")
        try:
            self._wait_for_workers(model, model.version)
        except ServiceUnavailable:
            # The server stops before anybody knows whether they start: the call is undone.
            model.unloading = True
            self._remove(model, self._config.unregister_model_timeout)
            raise
        except ServerError:
            self._keep_without_workers(model)
            raise
        return _status(200, f"{named} {settings.min_workers} initial workers")

    def _keep_without_workers(self, model: ModelVersion) -> None:
        """Stops the workers of a version of which one could not start; it stays registered, as in TorchServe."""
        self._wait_until_left(model, self._set_limits(model, 0, 0))
        # The answer is that the workers failed, whatever becomes of the snapshot; the log tells of that.
        with contextlib.suppress(SnapshotNotWritten):
            self._record()

    # Workers

    def _set_limits(self, model: ModelVersion, least: int, most: int) -> list[int]:
        """Starts or stops workers; returns the ids of those that were told to leave."""
        leaving: list[int] = []
        with self._registry.changed:
            model.min_workers, model.max_workers = least, most
            while len(model.workers) < least:
                worker = self._new_worker(model)
                model.workers[worker.worker_id] = worker
            while len(model.workers) > most:
                worker_id, worker = model.workers.popitem()
                if worker.report is not None:
                    model.leaving[worker_id] = worker
                leaving.append(worker_id)
            # What goes is off the data path before its batcher hears of it; what comes, when it has answered.
            self._publish()
            for batcher in sorted(model.loaded_in | {each.batcher for each in model.workers.values()}):
                if batcher not in model.loaded_in:
                    model.loaded_in.add(batcher)
                    self._send(batcher, LoadModel(model.spec))
                self._send(batcher, _workers_message(model, batcher))
            self._registry.changed.wait_for(
                lambda: self._registry.draining or {w.batcher for w in model.workers.values()} <= model.accepted_in,
                _ACCEPT_LIMIT_S,
            )
        return leaving

    def _new_worker(self, model: ModelVersion) -> ModelWorker:
        placement = model.placement
        gpu = self._assigner.next(placement, model.gpus_given)
        devices = None
        if gpu is not None and placement.parallel_level:
            devices = group_devices(placement, model.gpus_given)
        model.gpus_given += 1
        batcher = 0 if gpu is None else gpu + 1
        worker_id = self._registry.next_worker_id(placement.parallel_level)
        return ModelWorker(worker_id, batcher, gpu, time.time_ns() // 1_000_000, devices)

    def _wait_for_workers(self, model: ModelVersion, shown_version: str | None) -> None:
        """Waits until every worker whose first load was under way is ready.

        Raises:
            InternalServerError: one of them failed (OutOfResources: for lack of memory).
        """
        text = (
            f"Failed to start workers for model {model.name} version: "
            f"{'null' if shown_version is None else shown_version}"
        )
        deadline = time.monotonic() + model.spec.startup_timeout_s + _START_MARGIN_S
        changed = self._registry.changed
        with changed:
            waiting = [worker for worker in model.workers.values() if worker.is_pending]
            while pending := [worker for worker in waiting if not worker.is_ready]:
                self._refuse_while_draining()
                failed = [worker for worker in pending if not worker.is_pending]
                if any(each.report and each.report.load_status == _OUT_OF_MEMORY for each in failed):
                    # TorchServe's own type, whatever the status.
                    raise OutOfResources(text)
                if failed or not changed.wait(max(0.0, deadline - time.monotonic())):
                    raise InternalServerError(text)

    def _wait_until_left(self, model: ModelVersion, worker_ids: Iterable[int]) -> None:
        ids = set(worker_ids)
        with self._registry.changed:
            self._registry.changed.wait_for(
                lambda: self._registry.draining or not ids & set(model.leaving),
                self._config.unregister_model_timeout,
            )

    def _remove(self, model: ModelVersion, limit_s: float) -> bool:
        """Ends a version that is off the data path; False if its batchers did not let go of it in time."""
        with self._registry.changed:
            self._publish()
            for batcher in sorted(model.loaded_in):
                self._send(batcher, UnloadModel(model.spec.index))
            gone = self._registry.changed.wait_for(lambda: not model.loaded_in, limit_s)
            if not gone:
                return False
            self._registry.remove(model)
            self._publish()
            directory = self._registry.pass_on_archive(model)
        discard(directory)
        return True

    def _refuse_while_draining(self) -> None:
        if self._registry.draining:
            raise ServiceUnavailable("The server is stopping.")


class _KeyedLocks:
    """One lock for each key that is in use."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[tuple[str, str], tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: tuple[str, str]) -> Iterator[None]:
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


def _status(code: int, text: str) -> dict[str, Any]:
    return {"status": code, "body": {"status": text}}


def _workers_message(model: ModelVersion, batcher: int) -> SetWorkers:
    workers = [
        WantedWorker(each.worker_id, each.gpu_id, None if each.devices is None else list(each.devices))
        for each in model.workers_in(batcher)
    ]
    return SetWorkers(model.spec.index, workers)
