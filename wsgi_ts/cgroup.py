"""What a container may use of its machine: the limits of its control group, version 2 or 1."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores(root: Path = _ROOT, own: Path = _OWN) -> int:
    """How many cores this process may keep busy: those it may run on, within its group's limit, rounded up.

    `root` is where the control groups are mounted, `own` says which this process's are.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _folders("cpu", root, own):
        quota, period = (
            _words(folder / "cpu.max")
            or (_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
            or ("max", "")
        )
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, int(quota) / int(period))
    return max(1, math.ceil(cores))


def memory_limit(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Bytes that all processes of the group may take together, /dev/shm included; None for no limit.

    `root` and `own` are as for `usable_cores`.
    """
    found = []
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _folders("memory", root, own):
        for name in ("memory.max", "memory.limit_in_bytes"):
            (limit, *_) = _words(folder / name) or ("max",)
            # Version 1 says "none" by a number that is larger than any machine.
            if limit.isdigit() and int(limit) < machine:
                found.append(int(limit))
    return min(found, default=None)


def is_killed_as_one(root: Path = _ROOT, own: Path = _OWN) -> bool:
    """Whether the kernel ends all processes of the group when one of them runs out of memory (memory.oom.group)."""
    return any(_words(folder / "memory.oom.group") == ("1",) for folder in _folders("memory", root, own))


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The group's folder and those above it, whose limits count, too; inside a container some are out of sight."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.strip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _words(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text().split())
    except OSError:
        return ()
