"""What a service manager is told, over the socket that it has named in NOTIFY_SOCKET (systemd's `Type=notify`).

The variables are taken out of the environment: what a model's code says there would pass for the server's word.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

READY, STOPPING, WATCHDOG = "READY=1", "STOPPING=1", "WATCHDOG=1"


class Notify:
    """The way to the service manager; without one nothing is said.

    Attributes:
        is_watched: the service manager wants to hear WATCHDOG again and again.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        name = environ.pop("NOTIFY_SOCKET", "")
        wanted = environ.pop("WATCHDOG_USEC", "")
        watched = environ.pop("WATCHDOG_PID", "") or str(os.getpid())
        self.is_watched = bool(name and wanted) and watched == str(os.getpid())
        # "@" stands for the first byte of a name that is not in the file system.
        self._address = "\0" + name[1:] if name.startswith("@") else name

    def say(self, *lines: str) -> None:
        """Says something; a service manager that does not listen is no reason to do anything else."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), self._address)

    def reloading(self) -> None:
        """Says that the server is being replaced; READY follows."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def beat(self) -> None:
        """Says that the server works, where that is watched."""
        if self.is_watched:
            self.say(WATCHDOG)
