"""What remains when a model worker's process ends: how it ended, and what its handler left running.

A handler may fork, start programs, daemonise. All of these are found again: they are descendants of the
worker template (it is their subreaper) that are in the worker's session, carry its mark in their environment,
or have its mailbox mapped; or that descend from one which does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from wsgi_ts.quick_dataclass import dataclass

#: In the environment of a model worker and of every program that its handler starts.
WORKER_VARIABLE = "WSGI_TS_WORKER"
#: What a shell or a container runtime makes of a SIGKILL, most likely by the kernel's out-of-memory killer.
EXIT_CODE_OUT_OF_MEMORY = 137
_PROC = Path("/proc")
#: A process that SIGKILL does not end in this time hangs in the kernel; nobody waits for it, in seconds.
_KILL_LIMIT_S = 2.0
#: The same where somebody waits: the template serves its other workers again after it, in seconds.
_LEFTOVERS_LIMIT_S = 0.5


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    is_zombie: bool


def worker_mark(prefix: str, worker_id: int, start_count: int) -> str:
    """The value of WORKER_VARIABLE for one life of a worker."""
    return f"{worker_id}-{start_count}@{prefix}"


def exit_fields(status: int) -> tuple[int | None, str | None]:
    """Exit code and signal name (one of them is None) of a status as `os.waitpid` returns it."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code, None
    try:
        return None, signal.Signals(-code).name
    except ValueError:
        return None, f"SIG{-code}"


def kill_leftovers(worker_pid: int, marks: Collection[bytes], spare: Collection[int]) -> None:
    """Kills what a dead worker left behind among the descendants of this process.

    Call it while the worker is still a zombie, so that its pid cannot name another session.

    Args:
        worker_pid: the dead worker, leader of its session.
        marks: texts that only this worker's processes have in their environment or among their mappings.
        spare: pids of the workers that live; they and their descendants are left alone.
    """
    deadline = time.monotonic() + _LEFTOVERS_LIMIT_S
    # Until there are none: some may have been forked while the list was made.
    while _kill_below(lambda process: process.session == worker_pid or _has_mark(process.pid, marks), spare):
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)


def kill_descendants() -> None:
    """Kills everything below this process: workers, and all that their handlers started."""
    deadline = time.monotonic() + _KILL_LIMIT_S
    # Again and again, for those that were forked while the list was made.
    while time.monotonic() < deadline:
        _kill_below(lambda _: True, ())
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _kill_below(condemns: Callable[[_Process], bool], spare: Collection[int]) -> int:
    """Kills the descendants that are condemned, and the descendants of these; returns how many are not dead yet."""
    children: dict[int, list[_Process]] = {}
    for process in _all_processes():
        children.setdefault(process.parent, []).append(process)
    killed = 0
    pending = [(process, False) for process in children.get(os.getpid(), ())]
    while pending:
        process, condemned = pending.pop()
        if process.pid in spare:
            continue
        condemned = condemned or condemns(process)
        if condemned:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                killed += not process.is_zombie
        pending += [(child, condemned) for child in children.get(process.pid, ())]
    return killed


def _all_processes() -> list[_Process]:
    processes = []
    for name in os.listdir(_PROC):
        if name.isdigit():
            with contextlib.suppress(OSError):
                text = (_PROC / name / "stat").read_bytes()
                # The second field is a name in brackets, which may itself hold brackets and blanks.
                state, parent, _, session = text[text.rindex(b")") + 2 :].split()[:4]
                # A zombie may have children still: it is one as soon as its first thread has ended.
                if state != b"X":
                    processes.append(_Process(int(name), int(parent), int(session), state == b"Z"))
    return processes


def _has_mark(pid: int, marks: Collection[bytes]) -> bool:
    for file in ("environ", "maps"):
        with contextlib.suppress(OSError):
            text = (_PROC / str(pid) / file).read_bytes()
            if any(mark in text for mark in marks):
                return True
    return False
