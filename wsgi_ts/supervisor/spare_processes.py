"""Processes forked before they are needed: each of them can become any process that this one starts.

A new interpreter imports for a third of a second what a gunicorn or a batcher needs, and at a server's start they all
do so together. Forked from a process that has imported it, they begin at once and share its memory. That is safe only
before the first thread: a fork copies the locks that other threads hold. So they are forked first of all, and wait.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import logging
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module

from wsgi_ts.process import die_with_parent

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 1 << 20
#: Descriptors that one message can carry (SCM_MAX_FD).
_MOST_FDS = 253
_STDERR = 2
_FD_BYTES = array.array("i").itemsize


class Spare:
    """One waiting process, as the process sees it that has forked it; then what that has become.

    Attributes:
        pid: its number.
    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._sock = sock
        self._code: int | None = None

    def become(
        self, command: Sequence[str], environ: Mapping[str, str], pass_fds: Sequence[int], stderr: int | None
    ) -> bool:
        """Has it run a module, in a session of its own; False where it has ended before.

        Args:
            command: one of `python_command`.
            environ: all of its environment variables.
            pass_fds: descriptors that it gets, under the same numbers; it has no others.
            stderr: a descriptor to be its stderr; None for ours.
        """
        _, module, *arguments = command[command.index("-m") :]
        given, targets = [*pass_fds], [*pass_fds]
        if stderr is not None:
            given, targets = [*given, stderr], [*targets, _STDERR]
        message = {"module": module, "arguments": arguments, "environ": dict(environ), "fds": targets}
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))] if given else []
        try:
            self._sock.sendmsg([json.dumps(message).encode()], ancillary)  # a packet comes whole or not at all
        except OSError as error:
            log.warning("A process that was to become %s is not there: %s", module, error.strerror)
            self.end()
            return False
        self._sock.close()
        return True

    def end(self) -> None:
        """Ends it, where it is not needed."""
        self._sock.close()
        self.send_signal(signal.SIGKILL)
        self.wait()

    def poll(self) -> int | None:
        """Its return code as `subprocess` counts it, and None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Waits for its end; returns its return code."""
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal; nothing happens if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)  # nobody else can have its number before it is waited for

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


class Spares:
    """Waiting processes, each for one use."""

    def __init__(self) -> None:
        self._free: list[Spare] = []

    def fork(self, count: int, modules: Sequence[str]) -> None:
        """Forks so many processes that have imported these modules; in each of them this call does not return.

        Call it where nothing is left to clean up: each of them leaves by SystemExit. Does nothing where this process
        has threads already.
        """
        for module in modules:
            import_module(module)
        if threading.active_count() > 1:
            log.warning("%s runs already: processes are started one by one", threading.enumerate()[-1].name)
            return
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                sys.exit(_run(theirs.detach(), parent))
            theirs.close()
            self._free.append(Spare(pid, ours))

    def take(self) -> Spare | None:
        """One of them, if any is left."""
        return self._free.pop() if self._free else None

    def close(self) -> None:
        """Ends those that nobody has taken."""
        while (spare := self.take()) is not None:
            spare.end()


def _run(fd: int, parent: int) -> int:
    """Waits in the forked process until it is told what to be, and is that; returns the exit code."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _close_all_but(fd)
    with socket.socket(fileno=fd) as sock:
        try:
            data, ancillary, _, _ = sock.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(_MOST_FDS * _FD_BYTES))
        except OSError:
            data = b""
    if not data:
        os._exit(0)
    message = json.loads(data)
    received = array.array("i")
    for _, _, content in ancillary:
        received.frombytes(content)
    _place(list(received), message["fds"])
    os.setsid()
    os.environ.clear()
    os.environ.update(message["environ"])
    sys.argv = ["", *message["arguments"]]
    runpy.run_module(message["module"], run_name="__main__", alter_sys=True)
    return 0


def _close_all_but(fd: int) -> None:
    """Closes what the one that has forked it holds: others wait for the end of some of it. Nothing comes from stdin."""
    for each in map(int, os.listdir("/proc/self/fd")):
        if each > _STDERR and each != fd:
            with contextlib.suppress(OSError):  # the one that the list was read from
                os.close(each)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _place(received: Sequence[int], targets: Sequence[int]) -> None:
    """Gives descriptors the numbers that they are to have, and lets programs inherit them."""
    above = max([_STDERR, *targets, *received]) + 1
    # First out of the way: a number may be another one's target.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in received]
    for fd in received:
        os.close(fd)
    for fd, target in zip(moved, targets, strict=True):
        os.dup2(fd, target)
        os.close(fd)
