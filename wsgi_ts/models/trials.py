"""Other settings tried on a model that serves, as `wsgi-ts tune` does, and the old ones put back at the end.

A trial belongs to the process that has begun it: when that ends, however, everything is as before. Nothing that is
tried is in a snapshot, nor in what the guard keeps; what is kept at the end is. A batch size, a delay or a rule holds
from the next batch on, with the same workers; only for what a worker is started with (a batch larger than its mailbox
holds, its CPU threads) others take its place, and are ready before it goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from wsgi_ts.archive.manifest import Manifest
from wsgi_ts.control.server import Peer
from wsgi_ts.errors import BadRequest, ConflictStatus, ServerError
from wsgi_ts.messages import ModelSpec
from wsgi_ts.models.arguments import MAX_BATCH_SIZE, MAX_WORKERS
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, Trial
from wsgi_ts.models.workers import WorkerScaler, limit_workers
from wsgi_ts.process import is_readable
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.config import BATCH_POLICIES, Config

log = logging.getLogger(__name__)

#: How often it is looked whether a trial is over, in seconds; the end of its process is seen at once.
_LOOK_S = 1.0
_MOST_DELAY_MS = 86_400_000
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Trials:
    """Begins, changes and ends trials.

    Attributes:
        operation_on: `ModelManager`'s way to have a version to oneself, by its name and version.
        record: writes the snapshot.
    """

    config: Config
    registry: Registry
    workers: WorkerScaler
    operation_on: Callable[[str, str | None], AbstractContextManager[ModelVersion]]
    record: Callable[[], None]

    def begin(self, *, peer: Peer, model_name: str, version: str | None = None) -> dict[str, Any]:
        """Begins a trial; returns what holds for the version now, and what bears on what can be tried.

        Raises:
            ConflictStatus: somebody else tries something on it.
            BadRequest: it runs the functions of a workflow.
        """
        self.registry.refuse_while_draining()
        with self.operation_on(model_name, version) as model:
            model.refuse_while_tried()
            if model.spec.functions:
                raise BadRequest(f"{model_name} runs the functions of a workflow; only models can be tuned.")
            model.trial = Trial(peer.pid, model.spec, model.min_workers, model.max_workers)
            log.info("Process %d tries settings on model %s version %s", peer.pid, model.name, model.version)
            try:
                self._follow(model, model.trial)
            except BaseException:
                model.trial = None
                raise
            return _shown(model)

    def change(
        self,
        *,
        peer: Peer,
        model_name: str,
        version: str,
        workers: int,
        threads: int,
        batch_size: int,
        batch_policy: str,
        max_batch_delay: int,
    ) -> dict[str, Any]:
        """Has other settings hold for a version that the caller tries settings on.

        `threads` are the CPU threads of each worker; 0: the cores shared out among them. `batch_policy` says when a
        batch that is not full goes, `max_batch_delay` (milliseconds) how long it waits at most.

        Raises:
            ServerError: they cannot hold, since a worker does not start, for example; all is as it was before the call.
        """
        self.registry.refuse_while_draining()
        wanted = {
            "workers": (workers, 1, MAX_WORKERS),
            "threads": (threads, 0, _MOST_THREADS),
            "batch_size": (batch_size, 1, MAX_BATCH_SIZE),
            "max_batch_delay": (max_batch_delay, 0, _MOST_DELAY_MS),
        }
        for key, (value, least, most) in wanted.items():
            if type(value) is not int or not least <= value <= most:
                raise BadRequest(f"Parameter {key} must be a number from {least} to {most}.")
        if batch_policy not in BATCH_POLICIES:
            raise BadRequest(f"Parameter batch_policy must be one of {', '.join(BATCH_POLICIES)}.")
        with self.operation_on(model_name, version) as model:
            trial = _trial_of(model, peer)
            holders = self.registry.gpu_holders()
            workers, _ = limit_workers(model.placement, model.name, workers, workers, holders)
            spec = replace(
                trial.spec,
                batch_size=batch_size,
                max_batch_delay_ms=max_batch_delay,
                batch_policy=batch_policy,
                threads_per_worker=threads,
            )
            before, least, most = model.spec, model.min_workers, model.max_workers
            try:
                self._put(model, spec, workers, workers, exactly=False)
            except ServerError:
                self._put(model, before, least, most, exactly=False)
                raise
            return _shown(model)

    def end(self, *, peer: Peer, model_name: str, version: str, keep: bool = False) -> dict[str, Any]:
        """Ends a trial: puts back what held before it, or keeps what holds now, in the snapshot, too.

        Raises:
            ServerError: a worker with the settings to be kept does not start; then all is as before the trial.
        """
        with self.operation_on(model_name, version) as model:
            trial = _trial_of(model, peer)
            if not keep:
                self._put_back(model, trial)
                return _shown(model)
            try:
                self._put(model, model.spec, model.min_workers, model.max_workers, exactly=True)
            except ServerError:
                self._put_back(model, trial)
                raise
            model.trial = None
            log.info("Model %s version %s goes on with other settings: %s", model.name, model.version, _shown(model))
            shown = _shown(model)
        self.record()
        return shown

    def _put_back(self, model: ModelVersion, trial: Trial) -> None:
        try:
            self._put(model, trial.spec, trial.min_workers, trial.max_workers, exactly=True)
        except ServerError as error:
            # The workers that there are serve on, by the settings of before; those that are to come start with them.
            told = "Model %s version %s: its workers cannot be started anew with the settings of before: %s"
            log.error(told, model.name, model.version, error.message)
            self.workers.renew(model, trial.spec)
            self.workers.set_limits(model, trial.min_workers, trial.max_workers)
        finally:
            model.trial = None
        log.info("Model %s version %s has the settings that it had", model.name, model.version)

    def _put(self, model: ModelVersion, spec: ModelSpec, least: int, most: int, *, exactly: bool) -> None:
        """Has settings hold, and waits until its workers are ready.

        `exactly`: the workers are as if they had been started with these settings, and no larger.
        """
        started: list[int] = []
        leaving: list[int] = []
        if len(model.workers) > most:
            leaving += self.workers.set_limits(model, min(least, most), most).leaving
        made_of = (spec.batch_size, spec.threads_per_worker)
        started_with = {worker.started_with for worker in model.workers.values()}
        fits = all(size >= spec.batch_size and threads == spec.threads_per_worker for size, threads in started_with)
        if model.workers and (started_with != {made_of} if exactly else not fits):
            leaving += self.workers.replace(model, spec)
        elif model.spec != spec:
            self.workers.renew(model, spec)
        if (model.min_workers, model.max_workers) != (least, most) or len(model.workers) < least:
            change = self.workers.set_limits(model, least, most)
            started, leaving = change.started, leaving + change.leaving
        self.workers.wait_until_ready(model, model.version, started)
        self.workers.wait_until_left(model, leaving, self.config.unregister_model_timeout)

    def _follow(self, model: ModelVersion, trial: Trial) -> None:
        """Puts everything back when the process that tries ends before its trial."""
        try:
            pidfd = os.pidfd_open(trial.owner_pid)
        except OSError as error:
            raise ConflictStatus(f"Process {trial.owner_pid} cannot be watched: {error.strerror}") from error

        def watch() -> None:
            try:
                while model.trial is trial and not self.registry.draining:
                    if is_readable(pidfd, _LOOK_S):
                        self._abandon(model, trial)
            finally:
                os.close(pidfd)

        threading.Thread(target=watch, name="trial", daemon=True).start()

    def _abandon(self, model: ModelVersion, trial: Trial) -> None:
        try:
            with self.operation_on(model.name, model.version) as there_now:
                if there_now is model and model.trial is trial:
                    log.warning("Process %d has ended before what it tried was put back", trial.owner_pid)
                    self._put_back(model, trial)
        except ServerError as error:
            log.error("Model %s: what was tried cannot be put back: %s", model.name, error.message)
        finally:
            # Unregistered meanwhile, for example.
            if model.trial is trial:
                model.trial = None


def _trial_of(model: ModelVersion, peer: Peer) -> Trial:
    if model.trial is None or model.trial.owner_pid != peer.pid:
        raise ConflictStatus(f"Process {peer.pid} tries nothing on model {model.name} version {model.version}.")
    return model.trial


def _shown(model: ModelVersion) -> dict[str, Any]:
    spec = model.spec
    manifest: Manifest = model.directory.manifest
    config_file = ""
    with contextlib.suppress(OSError):
        if manifest.config_file:
            config_file = (model.directory.path / manifest.config_file).read_text(encoding="utf-8", errors="replace")
    return {
        "model": model.name,
        "version": model.version,
        "url": model.directory.url,
        "workflow": model.workflow,
        "workers": len(model.workers),
        "threads": spec.threads_per_worker,
        "batch_size": spec.batch_size,
        "batch_policy": spec.batch_policy,
        "max_batch_delay": spec.max_batch_delay_ms,
        "job_queue_size": spec.job_queue_size,
        "response_timeout": spec.response_timeout_s,
        "batches": not (spec.use_job_ticket or spec.sequence_batching or spec.async_communication),
        "steps": spec.continuous_batching or spec.async_communication,
        "sequences": spec.sequence_batching,
        "on_gpu": model.placement.device_type == "gpu",
        "most_workers": model.placement.worker_limit,
        "config_name": manifest.config_file or "model-config.yaml",
        "config_text": config_file,
    }
