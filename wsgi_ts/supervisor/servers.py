"""The supervisor's gunicorns and its gRPC server: processes on ports that outlive them, started again when they die."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.instance.listeners import BoundListener
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.models.registry import Registry
from wsgi_ts.process import INSTANCE_VARIABLE, Child, python_command
from wsgi_ts.restart_backoff import RestartBackoff
from wsgi_ts.settings.config import Config
from wsgi_ts.supervisor.child_output import FirstLives
from wsgi_ts.supervisor.loop import MainLoop

log = logging.getLogger(__name__)

#: A gRPC server that was not heard of at so many looks in a row, one a second, is hung.
_SILENT_LOOKS = 8
#: numpy's library for linear algebra, which none of them uses, starts a thread per core, each of which spins at first.
_NO_BLAS_THREADS = {"OPENBLAS_NUM_THREADS": "1"}


class WebProcess(ABC):
    """One gunicorn, or the gRPC server, through all its lives. Belongs to the supervisor's main thread.

    Attributes:
        name: for people.
        child: the process; None between two lives.
        ready_fd: readable when the process has something to say of itself; -1 between two lives.
        lives: tells whether all of it has booted at least once.
        restart_at: monotonic time of the next start; infinity while it runs.
    """

    def __init__(self, name: str, workers: int) -> None:
        """Starts nothing yet.

        Args:
            name: for people.
            workers: how many bytes in `ready_fd` say that all of it has booted.
        """
        self.name = name
        self.child: Child | None = None
        self.ready_fd = -1
        self.lives = FirstLives(name)
        self.restart_at = float("inf")
        self._workers = workers
        self._booted = 0
        self._starts = 0
        self._reopen_when_ready = False
        self._backoff = RestartBackoff()

    @abstractmethod
    def _command(self, common: list[str], tls_fd: int) -> tuple[list[str], list[int]]:
        """The command of the next life, and the descriptors that it inherits.

        Args:
            common: arguments that all have.
            tls_fd: see `start`.
        """

    def is_hung(self) -> bool:
        """Whether it was not heard of for too long, when asked once a second; gunicorn looks after its own."""
        return False

    def start(self, config_file: Path, run_dir: Path, prefix: str, tls_fd: int = -1) -> Child:
        """Starts the next life; `tls_fd` is a file with what TLS takes, -1 for none.

        Raises:
            OSError, RuntimeError: no process or thread can be started; nothing has changed.
        """
        self._booted = 0
        relay = self.lives.relay()
        common = ["--config-json", str(config_file), "--run-dir", str(run_dir), "--prefix", prefix]
        try:
            self.ready_fd, theirs = os.pipe()
            os.set_blocking(self.ready_fd, False)
            command, pass_fds = self._command([*common, "--ready-fd", str(theirs)], tls_fd)
            try:
                self.child = Child(
                    self.name,
                    command,
                    pass_fds=[theirs, *pass_fds, *(relay.server_fds if relay else ())],
                    environ={INSTANCE_VARIABLE: prefix, **_NO_BLAS_THREADS, **(relay.environ if relay else {})},
                    stderr=relay.fd if relay else None,
                )
            except OSError:
                self._close_ready_fd()
                raise
            finally:
                os.close(theirs)
        finally:
            if relay:
                relay.close()
        self.restart_at = float("inf")
        self._starts += 1
        return self.child

    def postpone(self, now: float) -> None:
        """Its next life could not be started at the monotonic time `now`: sets the time of the next try."""
        self.restart_at = now + self._backoff.on_death(now)

    def reopen_logs(self) -> None:
        """Has its processes open their log files again, or once it is up where it is just starting."""
        self._reopen_when_ready = not self._booted
        if self._booted and self.child is not None:
            self.child.send_signal(signal.SIGUSR1)

    def take_ready(self) -> bool:
        """Reads `ready_fd`; False when it is at its end (no process writes to it any more)."""
        try:
            data = os.read(self.ready_fd, 4096)
        except BlockingIOError:
            return True
        self._booted += len(data)
        if self._booted and self._reopen_when_ready:
            self.reopen_logs()
        self.lives.has_worked = self.lives.has_worked or self._booted >= self._workers
        return bool(data)

    def died(self, now: float) -> str:
        """Takes note of its death, at the monotonic time `now`; returns the reason."""
        assert self.child is not None
        reason = self.child.poll() or "running"
        self.child.close()
        self.child = None
        self._close_ready_fd()
        delay = self._backoff.on_death(now, came_up=self._booted >= self._workers)
        self.restart_at = now + delay
        if self._backoff.is_looping:
            log.error("%s dies again and again before it is up; the next start is in %g s", self.name, delay)
        return reason

    def describe(self) -> dict[str, Any]:
        """One line of `wsgi-ts status`."""
        return {
            "role": self.name,
            "pid": self.child.pid if self.child is not None else None,
            "state": "running" if self.child is not None else "restarting",
            "starts": self._starts,
        }

    def _close_ready_fd(self) -> None:
        os.close(self.ready_fd)
        self.ready_fd = -1


class Gunicorn(WebProcess):
    """One gunicorn: its arbiter, which has the web workers for children."""

    def __init__(self, kind: str, listeners: Sequence[BoundListener], workers: int) -> None:
        """Starts nothing yet.

        Args:
            kind: `inference` or `management`.
            listeners: the sockets it serves.
            workers: how many web workers it has.
        """
        super().__init__(f"gunicorn {kind}", workers)
        self._kind = kind
        self._listeners = tuple(listeners)

    def _command(self, common: list[str], tls_fd: int) -> tuple[list[str], list[int]]:
        arguments = ["--kind", self._kind, *common]
        for listener in self._listeners:
            arguments += ["--listener", listener.argument]
        pass_fds = [listener.sock.fileno() for listener in self._listeners]
        if tls_fd >= 0 and any(listener.address.is_tls for listener in self._listeners):
            arguments += ["--tls-fd", str(tls_fd)]
            pass_fds.append(tls_fd)
        return python_command("wsgi_ts.web", *arguments), pass_fds


class GrpcServer(WebProcess):
    """The process of the gRPC APIs, which says once a second that it is well."""

    def __init__(self, ports: Sequence[BoundListener]) -> None:
        """Starts nothing yet.

        Args:
            ports: those of the inference and of the management API.
        """
        super().__init__("gRPC server", 1)
        self._ports = tuple(ports)
        self._silent_looks = 0

    def is_hung(self) -> bool:
        """Whether it is up and has said nothing for too long, when asked once a second.

        Looks are counted, not seconds: when all processes were stopped for a while, it gets its time to speak.
        """
        if self.child is not None and self._booted:
            self._silent_looks += 1
        return self._silent_looks > _SILENT_LOOKS

    def take_ready(self) -> bool:
        """Takes note of its sign of life."""
        self._silent_looks = 0
        return super().take_ready()

    def died(self, now: float) -> str:
        """As for all."""
        self._silent_looks = 0
        return super().died(now)

    def _command(self, common: list[str], tls_fd: int) -> tuple[list[str], list[int]]:
        arguments, pass_fds = list(common), []
        for port in self._ports:
            arguments += [f"--{port.kinds[0]}", port.bound_to]
        if tls_fd >= 0 and self._ports[0].address.is_tls:
            arguments += ["--tls-fd", str(tls_fd)]
            pass_fds.append(tls_fd)
        return python_command("wsgi_ts.rpc", *arguments), pass_fds


class WebTier:
    """All gunicorns of an instance, and its gRPC server. Belongs to the supervisor's main thread.

    Attributes:
        processes: the gunicorn that carries predictions, one for the rest if there is any, the gRPC server.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[BoundListener],
        grpc_ports: Sequence[BoundListener],
        *,
        loop: MainLoop,
        directory: RunDirectory,
        registry: Registry,
        tls_fd: int,
        on_ready: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            config: the configuration.
            listeners: the sockets that are served.
            grpc_ports: the ports of the gRPC APIs, inference first.
            loop: where they are watched.
            directory: the run directory.
            registry: tells whether the instance is stopping, so that a death is none to speak of.
            tls_fd: a file with what TLS takes, -1 for none.
            on_ready: called when a process has something to say of itself.
            on_failure: told why a process that has never worked cannot be started.
        """
        inference = [listener for listener in listeners if "inference" in listener.kinds]
        others = [listener for listener in listeners if "inference" not in listener.kinds]
        self.processes: list[WebProcess] = [Gunicorn("inference", inference, config.web_workers)]
        if others:
            self.processes.append(Gunicorn("management", others, 1))
        self.processes.append(GrpcServer(grpc_ports))
        self._selector = loop.selector
        self._directory = directory
        self._registry = registry
        self._tls_fd = tls_fd
        self._on_ready = on_ready
        self._on_failure = on_failure

    @property
    def is_ready(self) -> bool:
        """Whether all web workers and the gRPC server have booted at least once."""
        return all(web.lives.has_worked for web in self.processes)

    def start(self) -> None:
        """Starts them."""
        for web in self.processes:
            self._start(web)

    def start_again(self, now: float) -> None:
        """Starts those again that have died and whose time has come."""
        for web in self.processes:
            if web.child is None and now >= web.restart_at:
                try:
                    self._start(web)
                except (OSError, RuntimeError) as error:
                    log.error("%s cannot be started: %s", web.name, error)
                    web.postpone(now)
                else:
                    log.info("%s started again", web.name)

    def kill_hung(self) -> None:
        """Kills those that do not answer any more; to be called once a second."""
        for web in self.processes:
            if web.child is not None and web.is_hung():
                log.error("%s (pid %d) does not answer any more and is killed", web.name, web.child.pid)
                web.child.send_signal(signal.SIGKILL)

    def reopen_logs(self) -> None:
        """Has all processes open their log files again."""
        for web in self.processes:
            web.reopen_logs()

    def stop(self) -> None:
        """Tells them to end what is under way and to go."""
        for web in self.processes:
            if web.child is not None:
                web.child.send_signal(signal.SIGTERM)

    def _start(self, web: WebProcess) -> None:
        directory = self._directory
        child = web.start(directory.config_file, directory.path, directory.prefix, self._tls_fd)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_death(web))
        self._selector.register(web.ready_fd, selectors.EVENT_READ, lambda: self._on_booted(web))
        directory.add_child(child.identity, web.name)

    def _on_booted(self, web: WebProcess) -> None:
        if not web.take_ready():
            self._selector.unregister(web.ready_fd)
        self._on_ready()

    def _on_death(self, web: WebProcess) -> None:
        assert web.child is not None
        pid = web.child.pid
        self._selector.unregister(web.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(web.ready_fd)
        reason = web.died(time.monotonic())
        self._directory.remove_child(pid)
        if self._registry.draining:
            return
        failure = web.lives.ended(reason)
        if failure is not None:
            web.restart_at = float("inf")
            self._on_failure(failure)
        else:
            log.error("%s (pid %d) has ended (%s) and is started again", web.name, pid, reason)
