"""What a guard does after the death of a supervisor: ends its processes, removes its names and files.

Runs in a fork of the guard, which stays small that way.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from wsgi_ts.control.memory_file import read_memory_file
from wsgi_ts.guard.protocol import LOCK, TOKENS
from wsgi_ts.instance.pid_file import remove_pid_file
from wsgi_ts.instance.run_directory import RunDirectory, is_lock_of
from wsgi_ts.process import die_with_parent
from wsgi_ts.security.tokens import remove_kept_key_file


def clean_up(run_dir: str, kept: Mapping[str, int], guard: int, *, for_good: bool) -> None:
    """Ends what a dead supervisor's processes still are, and removes what its record names.

    Args:
        run_dir: the run directory.
        kept: what the guard keeps.
        guard: its pid; this process ends with it.
        for_good: no supervisor follows, so that also the directory, the key file, the pid file and the Unix sockets go.

    Raises:
        RunDirectoryError: a process cannot be ended.
        OSError: something cannot be removed.
    """
    die_with_parent(guard)
    path = Path(run_dir)
    # Not locked any more: it may be another instance's.
    if is_lock_of(path, kept[LOCK]):
        RunDirectory.clear(path, kept[LOCK], guard, for_good=for_good)
    if for_good:
        for fd in kept.values():
            _remove_unix_name(fd)
        if TOKENS in kept:
            remove_kept_key_file(json.loads(read_memory_file(kept[TOKENS])))
        remove_pid_file(guard)


def _remove_unix_name(fd: int) -> None:
    """Removes the name of a listening Unix socket; nothing happens for other descriptors."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX and isinstance(name, str) and name:
            os.unlink(name)
