"""A child that dies with its parent.

It is started by exec, or made of a process that was forked before there were threads, so it inherits no lock of a
thread of its parent. It ties its life to its parent itself: `die_with_parent()` is the first thing that the main
function of a child calls.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from wsgi_ts.process import (
    PARENT_PID_VARIABLE,
    ProcessIdentity,
    exit_reason,
    inherited_environ,
    is_readable,
    start_time,
)
from wsgi_ts.supervisor.spare_processes import Spare


class Child:
    """A process that this one starts and ends. Make it from the thread that lives longest.

    It gets a session of its own: a Ctrl-C in the terminal reaches the supervisor alone.

    Args:
        pass_fds: descriptors that it inherits, under the same numbers.
        environ: variables that it gets in addition.
        stderr: a descriptor to be its stderr; None for ours.
        spare: a waiting process that is to run the command, which is one of `python_command`. Where it has ended, or
            there is none, a new process does.

    Raises:
        OSError: it cannot be started.

    Attributes:
        role: for people ("batcher 0"); also in the record of the run directory.
        pidfd: becomes readable when it ends; closed by `close`.
        identity: pid and start time.
    """

    def __init__(
        self,
        role: str,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environ: Mapping[str, str] | None = None,
        stderr: int | None = None,
        spare: Spare | None = None,
    ) -> None:
        variables = inherited_environ() | dict(environ or {})
        variables[PARENT_PID_VARIABLE] = str(os.getpid())
        # Without it setproctitle writes the title over the environment, and with it over the instance's mark.
        variables.setdefault("SPT_NOENV", "1")
        self.role = role
        self._process: subprocess.Popen[bytes] | Spare
        if spare is not None and spare.become(argv, variables, pass_fds, stderr):
            self._process = spare
        else:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                pass_fds=tuple(pass_fds),
                env=variables,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            raise
        # It is our child and not waited for yet, so it has an entry in /proc even if it has ended.
        self.identity = ProcessIdentity(self.pid, start_time(self.pid) or 0)

    def poll(self) -> str | None:
        """None while it runs, then why it ended (and it is no zombie any more)."""
        code = self._process.poll()
        return None if code is None else exit_reason(code)

    def send_signal(self, number: int) -> None:
        """Sends a signal; nothing happens if it has ended."""
        self._process.send_signal(number)

    def wait(self, limit_s: float) -> str | None:
        """Waits for its end at most `limit_s` seconds; returns what `poll` returns."""
        deadline = time.monotonic() + limit_s
        while self.poll() is None and (left := deadline - time.monotonic()) > 0:
            is_readable(self.pidfd, left)
        return self.poll()

    def close(self) -> None:
        """Gives the pidfd back; the process has ended, or is left to `die_with_parent`."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
