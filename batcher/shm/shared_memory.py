"""POSIX shared-memory objects: the one place that creates, maps, reserves and unlinks them.

Never `multiprocessing.shared_memory`: its resource tracker unlinks objects that other processes still use. Pages are
reserved with `posix_fallocate`, so a full /dev/shm is an error to report (`SharedMemoryFull`) and never a SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import posix_ipc

SHM_DIRECTORY = Path("/dev/shm")
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


class SharedMemoryFull(OSError):
    """/dev/shm has no room; the text says how much was asked for and what to do."""


class SharedMemory:
    """A mapped shared-memory object. `buffer` is a writable memoryview of all its bytes.

    Args:
        name: the object's name, without a slash.
        size: bytes; given when creating.
        reserve: bytes from the start to give pages now.
        create: make a new object (mode 0600, must not exist) instead of attaching to one.

    Raises:
        SharedMemoryFull: no room for `reserve` bytes; nothing is left behind.
        FileNotFoundError: attach to a name that does not exist.
        FileExistsError: create a name that exists.
    """

    def __init__(self, name: str, size: int = 0, *, reserve: int = 0, create: bool = False) -> None:
        self.name = name
        flags = posix_ipc.O_CREX if create else 0
        try:
            handle = posix_ipc.SharedMemory("/" + name, flags=flags, mode=0o600)
        except posix_ipc.ExistentialError as error:
            raise (FileExistsError if create else FileNotFoundError)(name) from error
        self.fd: int = _above_stdio(handle.fd)
        try:
            if create:
                os.ftruncate(self.fd, size)
                if reserve:
                    self.reserve(0, reserve)
            else:
                size = os.fstat(self.fd).st_size
            self._map = mmap.mmap(self.fd, size)
        except OSError:
            os.close(self.fd)
            if create:
                unlink(name)
            raise
        self.size = size
        self.buffer = memoryview(self._map)

    def reserve(self, offset: int, length: int) -> None:
        """Gives pages to a range, so that writing into it cannot fail.

        Raises:
            SharedMemoryFull: /dev/shm is full.
        """
        try:
            os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            free = free_bytes()
            raise SharedMemoryFull(
                errno.ENOSPC,
                f"/dev/shm is full: need {length} bytes, have {free}; make it larger (docker: --shm-size)",
            ) from error

    def populate(self, offset: int, length: int) -> None:
        """Maps a reserved range's pages in one call instead of one page fault each (a speed-up, not a need)."""
        with contextlib.suppress(OSError):  # Linux before 5.14 does not know the advice
            self._map.madvise(_MADV_POPULATE_WRITE, offset, length)

    def give_back(self, offset: int, length: int) -> None:
        """Frees the pages of a range; it reads as zeros afterwards."""
        mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        if _libc.fallocate(self.fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def words(self, offset: int, count: int) -> memoryview:
        """A view of `count` 64-bit words: `view[i] = v` is one aligned store."""
        return self.buffer[offset : offset + count * 8].cast("Q")

    def close(self) -> None:
        """Closes the descriptor; the mapping goes when its last view does (views are held all over the process)."""
        os.close(self.fd)


def free_bytes() -> int:
    """Bytes still free in /dev/shm."""
    status = os.statvfs(SHM_DIRECTORY)
    return status.f_bavail * status.f_frsize


def unlink(name: str) -> None:
    """Removes an object's name if it is there; mappings stay valid."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory("/" + name)


def unlink_prefix(prefix: str) -> list[str]:
    """Removes every shared-memory object and semaphore whose name starts with `prefix`; returns their names."""
    removed = []
    for entry in sorted(SHM_DIRECTORY.iterdir()):
        name = entry.name
        if name.startswith((prefix, "sem." + prefix)):
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()
                removed.append(name)
    return removed


def _above_stdio(fd: int) -> int:
    """The descriptor, or one for the same above stderr: a handler that has closed its output prints all the same."""
    if fd > 2:
        return fd
    higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return higher
