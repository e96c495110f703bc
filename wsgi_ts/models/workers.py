"""How many workers a model version has: starting and stopping them, and waiting until they are ready or gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from wsgi_ts.errors import InternalServerError, OutOfResources, ServerError, WorkerInitializationError
from wsgi_ts.gpu.assign import Assigner, Placement, group_devices
from wsgi_ts.messages import LoadModel, ModelSpec, SetWorkers, ToBatcher, UnloadModel, WantedWorker
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion, WorkerRecord

#: On top of the model's own startup time-out: a process's start, and the worker template's.
_START_MARGIN_S = 240.0
#: How long an answer waits for the batcher to know the model, so that the next request finds it.
_ACCEPT_LIMIT_S = 2.0
_OK = 200
_TIMED_OUT = 408
_OUT_OF_MEMORY = 507
#: To a batcher (its index): one message of the supervisor; never blocks.
Send = Callable[[int, ToBatcher], None]


class Change(NamedTuple):
    """The ids of workers that were told to start, and of those that were told to leave."""

    started: list[int]
    leaving: list[int]


class WorkerScaler:
    """Tells the batchers which workers each version has.

    Args:
        gpus: GPUs that models may use.
        send: takes a message to a batcher; dropped where that batcher is being restarted (see `replay`).
        publish: makes the registry's present state known to the data path.
    """

    def __init__(self, registry: Registry, gpus: int, send: Send, publish: Callable[[], None]) -> None:
        self._registry = registry
        self._assigner = Assigner(gpus)
        self._send = send
        self._publish = publish

    def set_limits(self, model: ModelVersion, least: int, most: int) -> Change:
        """Starts or stops workers, and waits a moment until the batchers know the model."""
        change = Change([], [])
        with self._registry.changed:
            model.min_workers, model.max_workers = least, most
            while len(model.workers) < least:
                worker = self._new_worker(model)
                model.workers[worker.worker_id] = worker
                change.started.append(worker.worker_id)
            while len(model.workers) > most:
                worker_id, worker = model.workers.popitem()
                if worker.report is not None:
                    model.leaving[worker_id] = worker
                change.leaving.append(worker_id)
            # What goes is off the data path before its batcher hears of it; what comes, when it has answered.
            self._tell(model)
            self._registry.changed.wait_for(
                lambda: self._registry.draining or {w.batcher for w in model.workers.values()} <= model.accepted_in,
                _ACCEPT_LIMIT_S,
            )
        return change

    def replace(self, model: ModelVersion, spec: ModelSpec) -> list[int]:
        """Starts as many workers again, of another spec, and lets the present ones go when those are ready.

        Returns the ids of those that were told to leave.

        Raises:
            ServerError: a new one does not get ready; none of them is left then, and the others have stayed.
        """
        with self._registry.changed:
            before, old = model.spec, list(model.workers)
            for worker in model.workers.values():
                worker.is_replaced = True
            self.renew(model, spec)
            new = [self._new_worker(model) for _ in old]
            model.workers.update((worker.worker_id, worker) for worker in new)
            self._tell(model)
        try:
            self.wait_until_ready(model, model.version, [worker.worker_id for worker in new])
        except ServerError:
            with self._registry.changed:
                for worker_id in old:
                    model.workers[worker_id].is_replaced = False
                self.renew(model, before)
            self._dismiss(model, [worker.worker_id for worker in new])
            raise
        self._dismiss(model, old)
        return old

    def renew(self, model: ModelVersion, spec: ModelSpec) -> None:
        """Has a spec hold for a version from now on: for its queue, and for workers that are started later."""
        with self._registry.changed:
            model.spec = spec
            for batcher in sorted(model.loaded_in):
                self._send(batcher, LoadModel(spec))

    def _dismiss(self, model: ModelVersion, worker_ids: Iterable[int]) -> None:
        with self._registry.changed:
            for worker_id in worker_ids:
                worker = model.workers.pop(worker_id)
                if worker.report is not None:
                    model.leaving[worker_id] = worker
            self._tell(model)

    def _tell(self, model: ModelVersion) -> None:
        """Tells the data path, and then each batcher, which workers a version has."""
        self._publish()
        for batcher in sorted(model.loaded_in | {each.batcher for each in model.workers.values()}):
            if batcher not in model.loaded_in:
                model.loaded_in.add(batcher)
                self._send(batcher, LoadModel(model.spec))
            self._send(batcher, _workers_message(model, batcher))

    def _new_worker(self, model: ModelVersion) -> WorkerRecord:
        placement = model.placement
        gpu = self._assigner.next(placement, model.gpus_given)
        devices = None
        if gpu is not None and placement.parallel_level:
            devices = group_devices(placement, model.gpus_given)
        model.gpus_given += 1
        batcher = 0 if gpu is None else gpu + 1
        worker_id = self._registry.numbers.next_worker_id(placement.parallel_level)
        started = (model.spec.batch_size, model.spec.threads_per_worker)
        return WorkerRecord(worker_id, batcher, gpu, time.time_ns() // 1_000_000, devices, started_with=started)

    def wait_until_ready(
        self, model: ModelVersion, shown_version: str | None, started: Collection[int], *, shown_name: str = ""
    ) -> None:
        """Waits until every worker is ready that the caller has started, or whose first load is under way.

        `shown_name` (by default the model's) and `shown_version` are for the error's text: None for "null", as
        TorchServe shows a default version. Of the workers that the caller has `started` one may have failed by now.

        Raises:
            InternalServerError: one of them failed (OutOfResources: for lack of memory).
            ServiceUnavailable: the server is stopping.
        """
        text = f"Failed to start workers for model {shown_name or model.name} version: {shown_version or 'null'}"
        deadline = time.monotonic() + model.spec.startup_timeout_s + _START_MARGIN_S
        changed = self._registry.changed
        with changed:
            waiting = [each for each in model.workers.values() if each.is_pending or each.worker_id in started]
            while pending := [worker for worker in waiting if not worker.is_ready]:
                self._registry.refuse_while_draining()
                failed = [worker for worker in pending if not worker.is_pending]
                model.load_lines = [line for each in failed if each.report for line in each.report.last_lines]
                if any(each.report and each.report.load_status == _OUT_OF_MEMORY for each in failed):
                    # TorchServe's own type, whatever the status.
                    raise OutOfResources(text)
                if failed or not changed.wait(max(0.0, deadline - time.monotonic())):
                    raise InternalServerError(text)

    def ready_count(self, model: ModelVersion) -> int:
        """How many workers of a version take requests."""
        with self._registry.changed:
            return sum(worker.is_ready for worker in model.workers.values())

    def has_timed_out(self, model: ModelVersion) -> bool:
        """Whether the workers of a version that could not load it took too long, and did nothing else wrong."""
        with self._registry.changed:
            loads = [each.report.load_status for each in model.workers.values() if each.report is not None]
            return all(status in (0, _OK, _TIMED_OUT) for status in loads)

    def wait_until_left(self, model: ModelVersion, worker_ids: Iterable[int], limit_s: float) -> None:
        """Waits until workers that were told to leave have ended, the server stops, or the time is over."""
        ids = set(worker_ids)
        with self._registry.changed:
            self._registry.changed.wait_for(lambda: self._registry.draining or not ids & set(model.leaving), limit_s)

    def unload(self, model: ModelVersion, limit_s: float) -> bool:
        """Has the batchers drop a version; false if they did not let go of it in time. Holds the registry's lock."""
        self._publish()
        for batcher in sorted(model.loaded_in):
            self._send(batcher, UnloadModel(model.spec.index))
        return self._registry.changed.wait_for(lambda: not model.loaded_in, limit_s)

    def has_unloaded(self, batcher: int, index: int) -> None:
        """Notes that a batcher has nothing of a version any more."""
        with self._registry.changed:
            model = self._registry.by_index(index)
            if model is not None:
                model.loaded_in.discard(batcher)
                self._registry.changed.notify_all()

    def replay(self, batcher: int) -> list[ToBatcher]:
        """The messages that tell a restarted batcher what it has to know. Call with the registry's lock held."""
        messages: list[ToBatcher] = []
        for model in self._registry.all_versions():
            if batcher in model.loaded_in and not model.unloading:
                messages += [LoadModel(model.spec), _workers_message(model, batcher)]
        return messages


def limit_workers(
    placement: Placement, name: str, least: int, most: int, holders: Mapping[int, Sequence[str]]
) -> tuple[int, int]:
    """Caps the least and most workers that are wanted of a model whose workers take several GPUs each.

    `holders` has for each GPU the workers that have it, for the message.

    Raises:
        WorkerInitializationError: not even one fits.
    """
    limit = placement.worker_limit
    if limit is None:
        return least, most
    if limit == 0:
        level = placement.parallel_level
        devices = placement.device_ids or range(placement.usable_gpus)
        held = "; ".join(f"GPU {gpu}: {', '.join(holders.get(gpu, ())) or 'free'}" for gpu in devices)
        raise WorkerInitializationError(
            f"No enough gpu devices for model:{name} parallelLevel:{level}. "
            f"A worker needs {level}, the model may use {placement.usable_gpus} ({held})."
        )
    return min(least, limit), min(most, limit)


def _workers_message(model: ModelVersion, batcher: int) -> SetWorkers:
    here = model.workers_in(batcher)
    workers = [
        WantedWorker(each.worker_id, each.gpu_id, None if each.devices is None else list(each.devices)) for each in here
    ]
    return SetWorkers(model.spec.index, workers, sum(each.is_replaced for each in here))
