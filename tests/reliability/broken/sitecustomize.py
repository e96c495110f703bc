"""Breaks a server on purpose: what the checker must notice. Python imports this where PYTHONPATH names its folder.

WSGI_TS_BROKEN names what is broken. Modules are changed as they are imported; they must not be compiled
(WSGI_TS_COMPILED=0).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[Any], None]


def give_anothers_answer(module: Any) -> None:
    """The answers of a batch go to the wrong requests."""
    accept = module.WorkerSlots.accept

    def accept_turned(self: Any, *arguments: Any) -> Any:
        refs, requests = accept(self, *arguments)
        return refs[1:] + refs[:1], requests

    module.WorkerSlots.accept = accept_turned


def run_again(module: Any) -> None:
    """What a dead worker had begun is queued once more."""
    worker_gone = module.Scheduler.worker_gone

    def worker_gone_again(self: Any, worker: Any, oom: bool, now: float) -> Any:
        for batch in worker.batches:
            for job in batch.jobs:
                if job.state == module.SlotState.RUNNING:
                    states = job.segment.states
                    states[job.slot] = states[job.slot] & ~0xFF | module.SlotState.CLAIMED
        return worker_gone(self, worker, oom, now)

    module.Scheduler.worker_gone = worker_gone_again


def forget_the_dead(module: Any) -> None:
    """What a dead worker had begun is never answered."""
    worker_gone = module.Scheduler.worker_gone

    def worker_gone_silently(self: Any, worker: Any, oom: bool, now: float) -> Any:
        return [action for action in worker_gone(self, worker, oom, now) if not isinstance(action, module.Fail)]

    module.Scheduler.worker_gone = worker_gone_silently


def leak_slots(module: Any) -> None:
    """One slot in twenty is not given back, and stays as if its request were still arriving."""
    release = module.SlotClient.release
    numbers = itertools.count(1)

    def release_most(self: Any, slot: int) -> None:
        release(self, slot)
        if next(numbers) % 20 == 0:
            self._free.remove(slot)
            self._states[slot] |= module.SlotState.WRITING

    module.SlotClient.release = release_most


def free_too_early(module: Any) -> None:
    """The slot of a client that has gone is free at once: a model worker still writes to it."""

    def forget_at_once(self: Any, slot: int) -> None:
        self.waiting.pop(slot, None)
        self.client.release(slot)

    module.Exchange.forget = forget_at_once


def lose_rings(module: Any) -> None:
    """Rings are lost, and whoever sleeps waits for one for ever."""
    module.Doorbell.ring = lambda self, *arguments: None
    module.Doorbell.sleep = lambda self, seconds: self._semaphore.wait(3600)


def outlive_parents(module: Any) -> None:
    """No process is tied to the one that started it."""
    module.die_with_parent = lambda parent_pid=None: None


def leave_names(module: Any) -> None:
    """Names in /dev/shm are not removed."""
    module.unlink = lambda name: None
    module.unlink_prefix = lambda prefix: []


CHANGES: dict[str, tuple[str, Change]] = {
    "give_anothers_answer": ("wsgi_ts.batcher.worker.slots", give_anothers_answer),
    "run_again": ("wsgi_ts.batcher.scheduler.scheduler", run_again),
    "forget_the_dead": ("wsgi_ts.batcher.scheduler.scheduler", forget_the_dead),
    "leak_slots": ("wsgi_ts.batcher.shm.client", leak_slots),
    "free_too_early": ("wsgi_ts.dataplane.exchange", free_too_early),
    "lose_rings": ("wsgi_ts.batcher.shm.doorbell", lose_rings),
    "outlive_parents": ("wsgi_ts.process", outlive_parents),
    "leave_names": ("wsgi_ts.batcher.shm.shared_memory", leave_names),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as it is, and changes it when it has been executed."""

    def __init__(self, name: str, change: Change) -> None:
        self._name = name
        self._change = change

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if os.environ.get("WSGI_TS_BROKEN") in CHANGES:
    sys.meta_path.insert(0, _Finder(*CHANGES[os.environ["WSGI_TS_BROKEN"]]))
