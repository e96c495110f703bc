"""What the machine says of a server under test: its processes by role, and its names in /dev/shm."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Every process of a server under test carries this variable in its environment.
MARKER = "WSGI_TS_TEST"
SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the server: its id, its parent's, and what it runs."""

    pid: int
    parent: int
    role: str
    command: str

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends it a signal; a process that is gone already is fine."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it runs (a zombie does not)."""
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def is_killed(self) -> bool:
        """Whether the kernel ends it, as soon as it gets a processor: SIGKILL is pending."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return True
        pending = [int(row.split()[1], 16) for row in status.splitlines() if row.startswith(("SigPnd:", "ShdPnd:"))]
        return any(mask >> signal.SIGKILL - 1 & 1 for mask in pending)


def marked(marker: str) -> list[psutil.Process]:
    """The live processes whose environment carries the marker's value."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            process = psutil.Process(int(entry.name))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def server_processes(marker: str) -> list[Member]:
    """The processes of one server, each with its role.

    Roles: guard (the process that the test has started), guard-fork (while that cleans up), supervisor,
    inference-arbiter, web-worker, management-arbiter, management-worker, grpc-server, span-exporter, batcher, template,
    warm-template, model-worker, other (children of those).
    """
    rows: dict[int, tuple[int, str]] = {}
    for process in marked(marker):
        with contextlib.suppress(psutil.NoSuchProcess):
            rows[process.pid] = (process.ppid(), " ".join(process.cmdline()))
    roles: dict[int, str] = {}

    def role(pid: int) -> str:
        if pid not in rows:
            return "outside"
        if pid not in roles:
            parent, command = rows[pid]
            roles[pid] = _role(command, role(parent))
        return roles[pid]

    return [Member(pid, parent, role(pid), command) for pid, (parent, command) in sorted(rows.items())]


#: The role of a child whose command line does not tell it from its parent's.
_CHILD_ROLES = {
    "inference-arbiter": "web-worker",
    "management-arbiter": "management-worker",
    "batcher": "template",
    "template": "model-worker",
    "warm-template": "model-worker",
}


def _role(command: str, parent: str) -> str:
    if parent == "template" and "warm worker template" in command:
        return "warm-template"
    if parent in _CHILD_ROLES:
        return _CHILD_ROLES[parent]
    if "wsgi_ts.guard" in command or "wsgi_ts.cli" in command:
        return "guard" if parent == "outside" else "guard-fork"
    if parent in ("guard", "outside") and "wsgi_ts.supervisor" in command:
        return "supervisor"
    if parent == "supervisor":
        if "batcher" in command:
            return "batcher"
        if "wsgi_ts.rpc" in command or "gRPC server" in command:
            return "grpc-server"
        if "span_exporter" in command or "span exporter" in command:
            return "span-exporter"
        return "inference-arbiter" if "inference" in command else "management-arbiter"
    return "other"


def shared_memory(prefix: str) -> list[str]:
    """The names in /dev/shm (semaphores included) that belong to an instance."""
    return sorted(name for name in os.listdir(SHM) if name.startswith((prefix, f"sem.{prefix}")))


def python(code: str) -> list[str]:
    """The command that runs code with this interpreter."""
    return [sys.executable, "-c", code]
