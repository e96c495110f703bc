"""The run directory: one per running instance, locked for its life, with a record of all that it makes.

The supervisor takes the lock and its guard keeps it: it is held as long as one of them lives.
`record.json` names the start of every shared-memory name and every child, and is written before they exist.
Whoever locks the directory next finds there what a killed instance has left, and removes that and no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.instance.record import Record, RecordError, record_of
from wsgi_ts.process import ProcessIdentity, boot_id, processes_of_instance, wait_until_gone
from wsgi_ts.run_files import RunFiles
from wsgi_ts.whole_files import replace_file

log = logging.getLogger(__name__)

#: How long a killed process of a dead instance may take to be gone, in seconds.
LEFTOVER_LIMIT_S = 5.0


class RunDirectoryError(Exception):
    """The run directory cannot be used; the message says why and what to do, on one line."""


class AlreadyRunning(RunDirectoryError):
    """A living supervisor holds the directory."""


class RunDirectory(RunFiles):
    """The locked run directory of this instance. Make it with `acquire`, give it back with `release`.

    Attributes:
        prefix: what the names of all shared memory and semaphores of this instance start with.
        lock_fd: the lock, which is held.
    """

    def __init__(self, path: Path, lock_fd: int, owner_pid: int | None = None, host_pid: int | None = None) -> None:
        super().__init__(path)
        self.prefix = f"wsgi-ts-{secrets.token_hex(16)}"
        self.lock_fd = lock_fd
        self._owner_pid = owner_pid or os.getpid()
        self._host = None if host_pid is None else ProcessIdentity.of(host_pid)
        self._children: dict[int, tuple[ProcessIdentity, str]] = {}
        own = ProcessIdentity.of(os.getpid())
        if owner_pid is not None and own is not None:
            self._children[own.pid] = own, "supervisor"

    @classmethod
    def acquire(
        cls, path: Path, *, lock_fd: int | None = None, owner_pid: int | None = None, host_pid: int | None = None
    ) -> RunDirectory:
        """Makes and locks the directory, removes what a dead instance left there, and writes the new record.

        Args:
            path: the directory.
            lock_fd: the lock, where the guard holds it since an earlier supervisor took it.
            owner_pid: the guard; None: there is none.
            host_pid: the process that the instance is an engine of; None: there is none.

        Raises:
            AlreadyRunning: another instance holds it.
            RunDirectoryError: it cannot be made or is not ours, or a process of the last instance lives on.
        """
        make_private(path)
        held = lock_fd is not None and is_lock_of(path, lock_fd)
        fd = lock_fd if held and lock_fd is not None else _lock(path)
        directory = cls(path, fd, owner_pid, host_pid)
        try:
            directory._remove_leftovers()
            directory.models.mkdir(mode=0o700)
            directory.plugins.mkdir(mode=0o700)
            directory._write_record()
        except OSError as error:
            os.close(fd)
            raise RunDirectoryError(f"run directory {path}: {error}; set another --run-dir") from error
        except BaseException:
            os.close(fd)
            raise
        return directory

    def add_child(self, identity: ProcessIdentity, role: str) -> None:
        """Writes down a process that was started."""
        self._children[identity.pid] = (identity, role)
        self._update_record()

    def remove_child(self, pid: int) -> None:
        """Writes down that a process has ended."""
        if self._children.pop(pid, None) is not None:
            self._update_record()

    @classmethod
    def clear(cls, path: Path, lock_fd: int, owner_pid: int, *, for_good: bool) -> None:
        """Removes what a dead supervisor has left, on behalf of its guard.

        Args:
            path: the directory.
            lock_fd: its lock.
            owner_pid: the guard.
            for_good: also the directory itself; else its record names the guard, until another supervisor comes.

        Raises:
            RunDirectoryError: a process of the dead instance cannot be ended.
            OSError: something cannot be removed.
        """
        directory = cls(path, lock_fd, owner_pid)
        directory._remove_leftovers()
        directory.release(for_good=for_good)

    def release(self, *, for_good: bool = True) -> None:
        """Removes all shared-memory names of the instance and all in the directory, and unlocks it.

        If not `for_good`, the guard goes on: the lock stays, and a record that names it.
        """
        unlink_prefix(self.prefix)
        self._remove_files()
        if not for_good:
            self.prefix = ""
            self._children.clear()
            self._write_record()
            return
        # Still locked: whoever waits for this very file finds, once it has the lock, that it has no name.
        self.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self.lock_fd)

    def _remove_leftovers(self) -> None:
        try:
            record = Record.read(self.path)
        except RecordError as error:
            log.warning("%s: what the last instance left is not removed", error)
            record = None
        if record is not None:
            if record.boot == boot_id():
                self._end_processes(record)
            if record.prefix:
                removed = unlink_prefix(record.prefix)
                told = "Removed what an instance that did not stop properly has left: %d shared-memory names"
                log.info(told, len(removed))
        self._remove_files()

    def _end_processes(self, record: Record) -> None:
        found = [child for child in record.children if child.is_alive()]
        if record.prefix:
            spared = [*found, record.host]
            found += [process for process in processes_of_instance(record.prefix) if process not in spared]
        for process in found:
            log.warning("Killing process %d, which an earlier instance has left", process.pid)
            process.kill()
        left = wait_until_gone(found, LEFTOVER_LIMIT_S)
        if left:
            pids = ", ".join(str(process.pid) for process in left)
            raise RunDirectoryError(
                f"{self.path}: process {pids} of the instance that ran here before cannot be killed "
                f"(waited {LEFTOVER_LIMIT_S:g} s); end it, or start with another --run-dir"
            )

    def _remove_files(self) -> None:
        sockets = self.control_socket, self.traces_socket, self.spans_socket
        for file in (self.log_plan, *sockets, self.config, self.routes, self.tokens, self.record):
            file.unlink(missing_ok=True)
        for entry in self.path.glob(".new-*"):
            entry.unlink(missing_ok=True)
        for directory in (self.models, self.plugins, self.tune):
            if directory.exists():
                shutil.rmtree(directory, onerror=_warn_of_leftover)

    def _update_record(self) -> None:
        """Writes the record; a full disk is no reason to stop: processes are found by the instance's prefix, too."""
        try:
            self._write_record()
        except OSError as error:
            log.warning("%s cannot be written: %s", self.record, error.strerror)

    def _write_record(self) -> None:
        owner = ProcessIdentity.of(self._owner_pid) or ProcessIdentity(self._owner_pid, 0)
        write_json(self.record, record_of(owner, self.prefix, self._children.values(), self._host))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces a file in one step (readers see the old or the new one), mode 0600."""
    replace_file(path, json.dumps(value, separators=(",", ":")))


def make_private(path: Path) -> None:
    """Makes a directory this user's alone; raises RunDirectoryError where that fails, or it is another user's."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise RunDirectoryError(f"run directory {path}: {error.strerror}; set another --run-dir") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        # In a shared directory of temporary files another user may have put something under our name.
        raise RunDirectoryError(
            f"run directory {path} is not a directory of this user's; set another --run-dir or TMPDIR"
        )
    path.chmod(0o700)


def is_lock_of(path: Path, fd: int) -> bool:
    """Whether a descriptor is that of a run directory's lock file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(RunFiles(path).lock), os.fstat(fd))
    return False


def _lock(path: Path) -> int:
    lock = RunFiles(path).lock
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            record = Record.find(path)
            pid = record.pid if record is not None and record.pid is not None else "unknown"
            raise AlreadyRunning(
                f"already running, pid {pid} (run directory {path}); stop it, or start with another --run-dir"
            ) from None
        if is_lock_of(path, fd):
            return fd
        # An instance that was stopping removed the file between our open and our lock.
        os.close(fd)


def _warn_of_leftover(function: Any, path: str, error: Any) -> None:
    log.warning("Cannot remove %s: %s", path, error[1])
