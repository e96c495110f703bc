"""Numbers that versions and workers have: where they stand on the data path, and what they are called."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from wsgi_ts.batcher.shm.layout import MAX_MODELS
from wsgi_ts.errors import OutOfResources
from wsgi_ts.messages import ModelSpec


class Numbers:
    """Gives out numbers and takes them back; from any thread.

    Args:
        first_worker_id: the id of the first worker; each one gets the next, and none is used twice.
        clear: removes what earlier owners of an index have counted under it, before a version gets it.
        first_group_id: the id of the first worker that spans several processes or GPUs.
    """

    def __init__(
        self, first_worker_id: int, clear: Callable[[int], None] = lambda index: None, first_group_id: int = 29500
    ) -> None:
        self._clear = clear
        self._lock = threading.Lock()
        self._next_worker_id = first_worker_id
        self._next_group_id = first_group_id
        # Indexes come back at the end: each rests as long as possible before another model gets it.
        self._free_indexes = deque(range(MAX_MODELS))

    def allocate_index(self) -> int:
        """A number on the data path for a new version; raises OutOfResources where no row is left for one."""
        (index,) = self.allocate_indexes(1)
        return index

    def allocate_indexes(self, count: int) -> list[int]:
        """So many numbers on the data path, for a version and its functions; raises OutOfResources, see above."""
        with self._lock:
            if len(self._free_indexes) < count:
                raise OutOfResources(
                    f"No more than {MAX_MODELS} model versions and functions of workflows can be registered."
                )
            indexes = [self._free_indexes.popleft() for _ in range(count)]
        for index in indexes:
            self._clear(index)
        return indexes

    def free_indexes(self, spec: ModelSpec) -> None:
        """Takes a version's numbers back, which nothing on the data path uses any more."""
        with self._lock:
            self._free_indexes += [spec.index, *(function["row"] for function in spec.functions.values())]

    def next_worker_id(self, parallel_level: int = 0) -> int:
        """An id that no worker has had; a worker that spans several processes or GPUs takes as many."""
        with self._lock:
            if parallel_level:
                self._next_group_id += parallel_level
                return self._next_group_id - parallel_level
            self._next_worker_id += 1
            return self._next_worker_id - 1
