"""`reload=true`: a model's workers are replaced when its files change, as authors of handlers want it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from wsgi_ts.errors import ServerError
from wsgi_ts.models.manager import ModelManager
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: How often the files are looked at (seconds). What is being written is read when it has not changed for as long.
PERIOD_S = 0.5
_CACHES = "__pycache__"

#: Of each file its path, time of change and size.
State = frozenset[tuple[str, int, int]]


@dataclass(slots=True)
class _Watched:
    """A version, the state of its files that its workers have loaded, and the one that was seen last."""

    model: ModelVersion
    loaded: State
    seen: State = frozenset()


class Reloader:
    """Watches the archive of each model, or the folder that it is used in place from, on a thread of its own."""

    def __init__(self, registry: Registry, manager: ModelManager) -> None:
        self._registry = registry
        self._manager = manager
        self._watched: list[_Watched] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reload", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watches no more; a replacement under way ends with the server."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            models = [
                model
                for model in self._registry.all_versions()
                # Functions come with their workflow's archive.
                if model.directory.downloaded is None and not model.spec.functions
            ]
            known = {id(each.model): each for each in self._watched}
            self._watched = [known.get(id(model)) or _Watched(model, _loaded_state(model)) for model in models]
            for watched in self._watched:
                self._look_at(watched)

    def _look_at(self, watched: _Watched) -> None:
        model, state = watched.model, state_of(watched.model)
        has_settled, watched.seen = watched.seen == state, state
        if state == watched.loaded or not has_settled or not state:
            return
        # Whatever becomes of it: the same files are not tried twice.
        watched.loaded = state
        log.info(
            "Model %s version %s: its files have changed, its workers are being replaced", model.name, model.version
        )
        try:
            self._manager.reload(model)
        except ServerError as error:
            log.error("Model %s version %s stays as it was: %s", model.name, model.version, error.message)
        else:
            log.info("Model %s version %s: its workers have been replaced", model.name, model.version)


def _loaded_state(model: ModelVersion) -> State:
    """What the workers of a version that is looked at for the first time have loaded; nothing, if files are newer."""
    state = state_of(model)
    started_at_ms = min((worker.created_at_ms for worker in list(model.workers.values())), default=None)
    if started_at_ms is None or all(changed_ns // 1_000_000 < started_at_ms for _, changed_ns, _ in state):
        return state
    return frozenset()


def state_of(model: ModelVersion) -> State:
    """Returns the present state of a model's files; it is empty while its archive is not there."""
    directory = model.directory
    if directory.archive is not None:
        return _states([directory.archive])
    found = []
    for folder, folders, files in os.walk(directory.path):
        folders[:] = [name for name in folders if name != _CACHES]
        found += [Path(folder, name) for name in files]
    return _states(found)


def _states(paths: list[Path]) -> State:
    states = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            # Editors write another file and rename it; the next look finds that. What nobody may read no worker loads.
            continue
        states.add((str(path), status.st_mtime_ns, status.st_size))
    return frozenset(states)
