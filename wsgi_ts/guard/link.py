"""The supervisor's side of its guard: what it has the guard keep for the supervisor after it, and what it tells it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from wsgi_ts.control.memory_file import memory_file, read_memory_file
from wsgi_ts.guard.protocol import ALIVE, CAME_UP, DROP, KEEP, PACKET_BYTES, REPLACE, STARTED, STOPPING

log = logging.getLogger(__name__)

#: How long a guard that is stopped or busy is waited for, in seconds.
_LIMIT_S = 2.0


class GuardLink:
    """What a supervisor says to its guard. Used from any thread; without a guard nothing is kept.

    Args:
        fd: the socket to the guard; -1 where there is none.
        pid, life, kept, is_watched, is_trial: see the attributes.

    Attributes:
        pid: the guard's; None where there is none.
        life: how many supervisors the guard has started, this one included.
        kept: what the supervisors before this one had it keep: descriptors by name, open in this process.
        is_watched: a watchdog wants to hear that this one works.
        is_trial: it takes the place of another, which the guard starts again if this one never serves.
    """

    def __init__(
        self,
        fd: int = -1,
        pid: int | None = None,
        life: int = 1,
        kept: Mapping[str, int] | None = None,
        *,
        is_watched: bool = False,
        is_trial: bool = False,
    ) -> None:
        self.pid = pid
        self.life = life
        self.is_watched = is_watched
        self.is_trial = is_trial
        self.kept = dict(kept or {})
        self._sock = socket.socket(fileno=fd) if fd >= 0 else None
        for each in (*self.kept.values(), *([fd] if fd >= 0 else [])):
            os.set_inheritable(each, False)
        if self._sock is not None:
            self._sock.settimeout(_LIMIT_S)

    def keep(self, name: str, fd: int) -> None:
        """Has the guard keep a descriptor, in the place of what it has under that name."""
        self._send(KEEP + name.encode(), fd)

    def keep_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Has the guard keep a JSON object, in memory that has no name."""
        if self._sock is None:
            return
        fd = memory_file(name, json.dumps(value).encode())
        try:
            self.keep(name, fd)
        finally:
            os.close(fd)

    def kept_json(self, name: str) -> Any:
        """The JSON object that an earlier supervisor had it keep; None where there is none."""
        fd = self.kept.get(name, -1)
        return None if fd < 0 else json.loads(read_memory_file(fd))

    def drop(self, name: str) -> None:
        """Has the guard close what it has under a name."""
        self._send(DROP + name.encode())

    def say_came_up(self) -> None:
        """Says that this supervisor serves: when it dies, another is to follow."""
        self._send(CAME_UP)

    def say_started(self) -> None:
        """Says that the start is complete, for whoever has started the guard."""
        self._send(STARTED)

    def say_alive(self) -> None:
        """Says that this supervisor's loop runs; to be called once a second where `is_watched`."""
        if self.is_watched:
            self._send(ALIVE)

    def replace(self, command: Sequence[str], config: str) -> bool:
        """Has another program, or another configuration, follow this supervisor; returns whether the guard knows.

        `command` is the next supervisor's, without what the guard adds, `config` its configuration as JSON.
        """
        fd = memory_file("config", config.encode())
        try:
            return self._send(REPLACE + json.dumps(list(command)).encode(), fd)
        finally:
            os.close(fd)

    def say_stopping(self) -> None:
        """Says that none is to follow; when it returns the guard has closed all that was dropped before."""
        if self._send(STOPPING):
            # One that does not answer has been stopped itself.
            with contextlib.suppress(OSError):
                assert self._sock is not None
                self._sock.recv(PACKET_BYTES)

    def _send(self, data: bytes, *fds: int) -> bool:
        if self._sock is None:
            return False
        try:
            socket.send_fds(self._sock, [data], list(fds))
        except OSError as error:
            log.warning("The guard (pid %s) does not take %s: %s", self.pid, data.decode(), error)
            return False
        return True
