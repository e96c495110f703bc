"""Ways to break a running server, by the role of the process that is hit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from support.eventually import eventually
from support.processes import Member
from support.server import ServerProcess


def one(server: ServerProcess, role: str, *, within: float = 5.0) -> Member:
    """The first process of a role, once there is one.

    Raises:
        AssertionError: there is none within so many seconds.
    """
    return eventually(lambda: server.processes(role), within=within, what=f"a process of role {role}")[0]


def kill(server: ServerProcess, role: str, number: int = signal.SIGKILL) -> Member:
    """Sends one process of a role a signal (SIGKILL) and waits until it is dead; returns what it was."""
    victim = one(server, role)
    victim.kill(number)
    eventually(lambda: not victim.alive, within=5, what=f"death of {role} {victim.pid}")
    return victim


@contextmanager
def paused(server: ServerProcess, role: str) -> Iterator[Member]:
    """Stops one process of a role (SIGSTOP) for the length of the block: alive, and hung."""
    victim = one(server, role)
    victim.kill(signal.SIGSTOP)
    try:
        yield victim
    finally:
        victim.kill(signal.SIGCONT)
