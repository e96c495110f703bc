"""What a server holds of the machine: processes, threads, descriptors, memory, names in /dev/shm.

The processes are those whose environment carries a marker, which stays through forks, new sessions and new parents.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.processes import SHM, marked


@dataclass(frozen=True)
class Census:
    """One look.

    Attributes:
        processes: how many.
        threads: of all of them.
        descriptors: of all of them.
        memory_bytes: of all of them: private, and their part of what they share.
        names: of the shared memory that they have mapped or open.
        shared_bytes: what those names take.
    """

    processes: int
    threads: int
    descriptors: int
    memory_bytes: int
    names: frozenset[str]
    shared_bytes: int


def take(marker: str) -> Census:
    """Looks at the processes that carry a marker; one that ends meanwhile counts no more."""
    processes = threads = descriptors = memory = 0
    names: set[str] = set()
    for process in marked(marker):
        with contextlib.suppress(OSError, psutil.Error):
            found = process.num_threads(), process.num_fds(), process.memory_full_info().pss
            names |= _names_of(process.pid)
            processes += 1
            threads += found[0]
            descriptors += found[1]
            memory += found[2]
    return Census(processes, threads, descriptors, memory, frozenset(names), bytes_of(names))


def _names_of(pid: int) -> set[str]:
    prefix = f"{SHM}/"
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, _, path = line.partition(prefix)
            if path and not path.endswith(" (deleted)"):
                found.add(path)
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith(prefix) and not target.endswith(" (deleted)"):
                    found.add(target.removeprefix(prefix))
    return found


def existing(names: Iterable[str]) -> list[str]:
    """Those of the names that are in /dev/shm."""
    return sorted(name for name in names if (SHM / name).exists())


def bytes_of(names: Iterable[str]) -> int:
    """What names in /dev/shm take."""
    total = 0
    for name in names:
        with contextlib.suppress(OSError):
            total += (SHM / name).stat().st_blocks * 512
    return total
