"""What the machine around a server can do to it: disks that are full or read-only, no descriptors, no processor."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.eventually import eventually


def mounts_are_possible() -> bool:
    """Whether this process may mount a file system."""
    if os.getuid() != 0:
        return False
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of that size at a folder, with what lies there."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], check=True)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    try:
        yield folder
    finally:
        # Lazily: a server may still have files open there.
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Another program takes all room of the disk that a folder is on, for the length of the block."""
    hog = folder / "hog"
    with hog.open("wb") as file, contextlib.suppress(OSError):
        while True:
            status = os.statvfs(folder)
            free = status.f_bavail * status.f_frsize
            if not free:
                break
            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
    try:
        yield
    finally:
        hog.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The disk at a folder cannot be written, for the length of the block."""
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


@contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """A process can open nothing more, for the length of the block."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many other programs want the processor all the time, for the length of the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        eventually(lambda: all(each.poll() is None for each in others), within=5, what="the busy programs")
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()
