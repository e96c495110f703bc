"""What is true of the instance as a whole: its version and configuration, and the shared memory that it has."""

from __future__ import annotations

import os
import time
from hashlib import sha256

from wsgi_ts import __version__
from wsgi_ts.batcher.shm.shared_memory import SHM_DIRECTORY
from wsgi_ts.metrics.exposition import Family
from wsgi_ts.metrics.specification import GAUGE, OWN_PREFIX
from wsgi_ts.settings.config import Config

#: Bytes of the hash that are shown: a double holds them exactly.
_HASH_BYTES = 6
_BLOCK = 512
#: How long sizes are shown before they are measured again, in seconds: with many model workers there are many objects.
_FRESH_S = 5.0


class InstanceMetrics:
    """The gauges of one instance, whose shared-memory names begin with `prefix`."""

    def __init__(self, config: Config, prefix: str) -> None:
        self._prefix = prefix
        self._measured_at = -_FRESH_S
        self._shm_bytes = 0
        digest = sha256(config.to_json().encode()).digest()
        self._config_hash = int.from_bytes(digest[:_HASH_BYTES], "big")

    def families(self) -> list[Family]:
        """The gauges, now."""
        now = time.monotonic()
        if now - self._measured_at >= _FRESH_S:
            self._measured_at, self._shm_bytes = now, _shm_bytes(self._prefix)
        free = os.statvfs(SHM_DIRECTORY)
        build = Family(f"{OWN_PREFIX}build_info", GAUGE, "Always 1; the version is a label", ("version",))
        build.samples[(__version__,)] = 1
        values = {
            "config_hash": ("A number that the configuration decides: equal for equal ones", self._config_hash),
            "shm_bytes": ("Shared memory that the instance has, in bytes", self._shm_bytes),
            "shm_free_bytes": ("Shared memory that is left on the machine, in bytes", free.f_bavail * free.f_frsize),
        }
        return [
            build,
            *(Family(OWN_PREFIX + name, GAUGE, text, (), {(): value}) for name, (text, value) in values.items()),
        ]


def _shm_bytes(prefix: str) -> int:
    """How much memory the objects have whose names begin so; what is mapped and has no pages does not count."""
    total = 0
    with os.scandir(SHM_DIRECTORY) as entries:
        for entry in entries:
            # A doorbell is a semaphore, whose file has the name behind `sem.`.
            if entry.name.removeprefix("sem.").startswith(prefix):
                try:
                    total += entry.stat().st_blocks * _BLOCK
                except FileNotFoundError:  # removed meanwhile, with its worker
                    continue
    return total
