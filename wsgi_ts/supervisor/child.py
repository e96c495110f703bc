"""The supervisor's processes: started, given up or started again when they have died, killed when they hang.

Belongs to the supervisor's main thread: a child dies with the thread that has started it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from wsgi_ts.control.channel import Channel
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.models.registry import Registry
from wsgi_ts.process import INSTANCE_VARIABLE
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.restart_backoff import RestartBackoff
from wsgi_ts.supervisor.child_output import StderrRelay
from wsgi_ts.supervisor.child_process import Child
from wsgi_ts.supervisor.loop import MainLoop
from wsgi_ts.supervisor.spare_processes import Spares

log = logging.getLogger(__name__)

_SHOWN_LINES = 10


class SupervisedProcess(ABC):
    """One process through all its lives.

    Attributes:
        name: for people.
        child: its present life; None between two lives.
        starts: how many lives it has had.
        restart_at: monotonic time of the next start; infinity while it runs, and once it is given up.
        came_up: whether its present life is of use; decides how long the next one is waited for.
        has_worked: whether it has been of use at least once.
        gives_up: whether one that never works is given up; not where it worked under the supervisor before this one.
        spares: processes that wait, one of which its next life is, if any is left.
    """

    #: So many lives may end before one has worked: a child may be killed by accident, and a fault repeats itself.
    LIVES = 3
    #: Silent at so many looks in a row, one a second, it hangs. Looks are counted, and no time measured: when all
    #: processes were stopped for a while, it gets its time to speak.
    hung_looks: float = math.inf

    def __init__(self, name: str, directory: RunDirectory) -> None:
        self.name = name
        self.child: Child | None = None
        self.starts = 0
        self.restart_at = math.inf
        self.came_up = False
        self.has_worked = False
        self.gives_up = True
        self.spares = Spares()
        self._directory = directory
        self._backoff = RestartBackoff()
        self._relay: StderrRelay | None = None
        self._failed_lives = 0
        self._silent_looks = 0

    @property
    @abstractmethod
    def inbox(self) -> Channel | int:
        """What the supervisor reads from it, while it runs."""

    def _run(self, command: Sequence[str], pass_fds: Sequence[int], environ: Mapping[str, str] | None = None) -> None:
        """Starts the process of the next life; it inherits `pass_fds`, and gets further environment variables.

        Raises:
            OSError, RuntimeError: no process or thread can be started; nothing has changed.
        """
        # Who has worked gets the server's own stderr.
        relay = None if self.has_worked else StderrRelay(self.name)
        try:
            self.child = Child(
                self.name,
                command,
                pass_fds=[*pass_fds, *(relay.server_fds if relay else ())],
                environ={
                    INSTANCE_VARIABLE: self._directory.prefix,
                    **(environ or {}),
                    **(relay.environ if relay else {}),
                },
                stderr=relay.fd if relay else None,
                spare=self.spares.take(),
            )
        finally:
            if relay:
                relay.close()
        self._relay = relay
        self.starts += 1
        self.restart_at = math.inf
        self.came_up = False
        self._silent_looks = 0

    def postpone(self, now: float) -> None:
        """Sets the time of the next try, where a life could not be started at the monotonic time `now`."""
        self.restart_at = now + self._backoff.on_death(now)

    def is_hung(self) -> bool:
        """Looks, once a second, whether it was silent for too long."""
        is_hung = self._silent_looks >= self.hung_looks
        self._silent_looks += 1
        return is_hung

    def died(self, now: float) -> str:
        """Takes note of the death of its process, at the monotonic time `now`; returns the reason."""
        assert self.child is not None
        reason = self.child.poll() or "running"
        self.child.close()
        self.child = None
        delay = self._backoff.on_death(now, came_up=self.came_up)
        self.restart_at = now + delay
        if self._backoff.is_looping:
            log.error("%s dies again and again before it is up; the next start is in %g s", self.name, delay)
        return reason

    def give_up(self, reason: str) -> str | None:
        """Decides, after a death for `reason` ("exit code 1"), whether it is given up; says why then, on one line."""
        if self.has_worked or not self.gives_up:
            return None
        self._failed_lives += 1
        if self._failed_lives < self.LIVES:
            return None
        self.restart_at = math.inf
        return self.failure(f"it ended {self._failed_lives} times before it had worked, at last with {reason}")

    def failure(self, fault: str) -> str:
        """Returns what is wrong and its last line, on one line; logs the lines before that."""
        lines = self._relay.last_lines() if self._relay is not None else []
        if lines:
            log.error("%s, its last lines: %s", self.name, " | ".join(lines[-_SHOWN_LINES:]))
        said = f"; its last line: {lines[-1].strip()}" if lines else ""
        return f"{self.name} cannot be started: {fault}{said}"

    def describe(self) -> dict[str, Any]:
        """Returns its line of `wsgi-ts status`."""
        return {
            "role": self.name,
            "pid": self.child.pid if self.child is not None else None,
            "state": "running" if self.child is not None else "restarting",
            "starts": self.starts,
        }


Process = TypeVar("Process", bound=SupervisedProcess)


@dataclass(frozen=True, slots=True)
class Owner:
    """What all processes need of the supervisor.

    Attributes:
        loop: where they are watched and heard.
        directory: the run directory, which records them.
        registry: tells whether the instance is stopping, so that a death is none to speak of.
        on_ready: called when one of them has something to say of itself.
        on_failure: told why one that has never worked cannot be started.
        spares: processes that wait to be one of these.
    """

    loop: MainLoop
    directory: RunDirectory
    registry: Registry
    on_ready: Callable[[], None]
    on_failure: Callable[[str], None]
    spares: Spares


class ProcessGroup(ABC, Generic[Process]):
    """Processes of one kind."""

    def __init__(self, processes: Sequence[Process], owner: Owner) -> None:
        self.processes = list(processes)
        self._owner = owner
        for process in self.processes:
            process.spares = owner.spares

    @abstractmethod
    def _start(self, process: Process) -> None:
        """Starts a life of a process."""

    @abstractmethod
    def _hear(self, process: Process) -> bool:
        """Takes what has come in a process's inbox; False at its end."""

    def _may_start(self, process: Process, now: float) -> bool:
        """Tells whether nothing of a process's last life is in the way of the next."""
        return True

    def _bury(self, process: Process) -> str:
        """Takes note of the death of a process; returns the reason."""
        return process.died(time.monotonic())

    def start(self) -> None:
        """Starts all of them; raises OSError or RuntimeError where no process or thread can be started."""
        for process in self.processes:
            self._start_watched(process)

    def start_again(self, now: float) -> None:
        """Starts those again that have died and whose time has come."""
        for process in self.processes:
            if process.child is None and self._may_start(process, now) and now >= process.restart_at:
                try:
                    self._start_watched(process)
                except (OSError, RuntimeError) as error:
                    log.error("%s cannot be started: %s", process.name, error)
                    process.postpone(now)
                else:
                    log.info("%s started again, life %d", process.name, process.starts)

    def kill_hung(self) -> None:
        """Kills those that do not answer any more; to be called once a second."""
        for process in self.processes:
            if process.child is not None and process.is_hung():
                log.error("%s (pid %d) does not answer any more and is killed", process.name, process.child.pid)
                process.child.send_signal(signal.SIGKILL)

    def _start_watched(self, process: Process) -> None:
        self._start(process)
        assert process.child is not None
        selector = self._owner.loop.selector
        selector.register(process.child.pidfd, selectors.EVENT_READ, lambda: self._on_death(process))
        selector.register(process.inbox, selectors.EVENT_READ, lambda: self._on_news(process))
        self._owner.directory.add_child(process.child.identity, process.name)

    def _on_news(self, process: Process) -> None:
        if not self._hear(process):
            self._owner.loop.selector.unregister(process.inbox)

    def _on_death(self, process: Process) -> None:
        assert process.child is not None
        pid = process.child.pid
        selector = self._owner.loop.selector
        selector.unregister(process.child.pidfd)
        # It may have come to its end before.
        with contextlib.suppress(KeyError):
            selector.unregister(process.inbox)
        reason = self._bury(process)
        self._owner.directory.remove_child(pid)
        if self._owner.registry.draining:
            return
        failure = process.give_up(reason)
        if failure is not None:
            self._owner.on_failure(failure)
        else:
            log.error("%s (pid %d) has ended (%s) and is started again", process.name, pid, reason)
