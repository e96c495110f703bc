"""Machines as far as the network goes: namespaces with an address and a host name each, joined by a cable."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Machine:
    """A thread that lives in a namespace: what it does, and what it starts, happens on that machine.

    Attributes:
        address: of the machine, which is its name, too: it can be resolved without a file of hosts.
    """

    def __init__(self, namespace: str, address: str) -> None:
        self.address = address
        self._namespace = namespace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=namespace, initializer=self._enter)

    def begin(self, function: Callable[..., T], *arguments: Any, **named: Any) -> Future[T]:
        """Has something done there."""
        return self._thread.submit(function, *arguments, **named)

    def do(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Has something done there, and returns what comes of it."""
        return self.begin(function, *arguments, **named).result()

    def leave(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _enter(self) -> None:
        fd = os.open(f"/run/netns/{self._namespace}", os.O_RDONLY)
        try:
            if _libc.setns(fd, _CLONE_NEWNET) or _libc.unshare(_CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), "a namespace cannot be entered")
        finally:
            os.close(fd)
        name = self.address.encode()
        if _libc.sethostname(name, len(name)):
            raise OSError(ctypes.get_errno(), "the host name cannot be set")


def are_possible() -> bool:
    """Whether this process may make namespaces."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"wts-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _ip(f"netns del {name}")
    return made


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them; nothing else can be reached from there."""
    mark = secrets.token_hex(4)
    names = [f"wts-{mark}-{number}" for number in (0, 1)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _ip(f"netns add {name}")
            stack.callback(_ip, f"netns del {name}")
        _ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        machines = []
        for number, name in enumerate(names, 1):
            address = f"10.77.0.{number}"
            _ip(f"-n {name} addr add {address}/24 dev eth0")
            _ip(f"-n {name} link set lo up")
            _ip(f"-n {name} link set eth0 up")
            machines.append(Machine(name, address))
            stack.callback(machines[-1].leave)
        yield machines[0], machines[1]


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
