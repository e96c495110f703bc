"""Files in memory, without a name: for what processes hand to each other and nobody else is to find."""

from __future__ import annotations

import os


def memory_file(name: str, data: bytes) -> int:
    """A descriptor of a new file in memory that holds `data`, and is called `name` in /proc; the caller closes it."""
    fd = os.memfd_create(f"wsgi-ts-{name}", os.MFD_CLOEXEC)
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    return fd


def read_memory_file(fd: int) -> bytes:
    """All that is in a file in memory; its position, which other processes share, stays where it is."""
    return os.pread(fd, os.fstat(fd).st_size, 0)
