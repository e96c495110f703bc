"""The supervisor's gunicorns: processes on sockets that outlive them, started again when they die."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.config import Config
from wsgi_ts.listeners import BoundListener
from wsgi_ts.main_loop import MainLoop
from wsgi_ts.process import INSTANCE_VARIABLE, Child, RestartBackoff, python_command
from wsgi_ts.registry import Registry
from wsgi_ts.run_directory import RunDirectory

log = logging.getLogger(__name__)


class Gunicorn:
    """One gunicorn, through all its lives. Belongs to the supervisor's main thread.

    Attributes:
        kind: `inference` or `management`.
        child: its arbiter; None between two lives.
        ready_fd: readable when a web worker has booted; -1 between two lives.
        is_ready: all its web workers have booted at least once.
        restart_at: monotonic time of the next start; infinity while it runs.
    """

    def __init__(self, kind: str, listeners: Sequence[BoundListener], workers: int) -> None:
        """Starts nothing yet.

        Args:
            kind: `inference` or `management`.
            listeners: the sockets it serves.
            workers: how many web workers it has.
        """
        self.kind = kind
        self.child: Child | None = None
        self.ready_fd = -1
        self.is_ready = False
        self.restart_at = float("inf")
        self._listeners = tuple(listeners)
        self._workers = workers
        self._booted = 0
        self._starts = 0
        self._reopen_when_ready = False
        self._backoff = RestartBackoff()

    @property
    def name(self) -> str:
        """For people."""
        return f"gunicorn {self.kind}"

    def start(self, config_file: Path, run_dir: Path, prefix: str, tls_fd: int = -1) -> Child:
        """Starts the next life; `tls_fd` is a file with what https listeners take, -1 for none.

        Raises:
            OSError: no process can be started; nothing has changed.
        """
        self._booted = 0
        arguments = ["--kind", self.kind, "--config-json", str(config_file)]
        arguments += ["--run-dir", str(run_dir), "--prefix", prefix]
        for listener in self._listeners:
            arguments += ["--listener", listener.argument]
        pass_fds = [listener.sock.fileno() for listener in self._listeners]
        if tls_fd >= 0 and any(listener.address.is_tls for listener in self._listeners):
            arguments += ["--tls-fd", str(tls_fd)]
            pass_fds.append(tls_fd)
        self.ready_fd, theirs = os.pipe()
        os.set_blocking(self.ready_fd, False)
        try:
            self.child = Child(
                self.name,
                python_command("wsgi_ts.gunicorn_app", *arguments, "--ready-fd", str(theirs)),
                pass_fds=[theirs, *pass_fds],
                environ={INSTANCE_VARIABLE: prefix},
            )
        except OSError:
            self._close_ready_fd()
            raise
        finally:
            os.close(theirs)
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
        self.is_ready = self.is_ready or self._booted >= self._workers
        return bool(data)

    def died(self, now: float) -> str:
        """Takes note of the death of its arbiter, at the monotonic time `now`; returns the reason."""
        assert self.child is not None
        reason = self.child.poll() or "running"
        self.child.close()
        self.child = None
        self._close_ready_fd()
        delay = self._backoff.on_death(now)
        self.restart_at = now + delay
        if self._backoff.is_looping:
            log.error("%s dies again and again; the next start is in %g s", self.name, delay)
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


class WebTier:
    """All gunicorns of an instance. Belongs to the supervisor's main thread.

    Attributes:
        gunicorns: one for what carries predictions, one for the rest if there is any.
    """

    def __init__(
        self,
        config: Config,
        listeners: Sequence[BoundListener],
        *,
        loop: MainLoop,
        directory: RunDirectory,
        registry: Registry,
        tls_fd: int,
        on_ready: Callable[[], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            config: the configuration.
            listeners: the sockets that are served.
            loop: where they are watched.
            directory: the run directory.
            registry: tells whether the instance is stopping, so that a death is none to speak of.
            tls_fd: a file with what https listeners take, -1 for none.
            on_ready: called when a web worker has booted.
        """
        inference = [listener for listener in listeners if "inference" in listener.kinds]
        others = [listener for listener in listeners if "inference" not in listener.kinds]
        self.gunicorns = [Gunicorn("inference", inference, config.web_workers)]
        if others:
            self.gunicorns.append(Gunicorn("management", others, 1))
        self._selector = loop.selector
        self._directory = directory
        self._registry = registry
        self._tls_fd = tls_fd
        self._on_ready = on_ready

    @property
    def is_ready(self) -> bool:
        """Whether all web workers have booted at least once."""
        return all(web.is_ready for web in self.gunicorns)

    def start(self) -> None:
        """Starts them."""
        for web in self.gunicorns:
            self._start(web)

    def start_again(self, now: float) -> None:
        """Starts those again that have died and whose time has come."""
        for web in self.gunicorns:
            if web.child is None and now >= web.restart_at:
                try:
                    self._start(web)
                except OSError as error:
                    log.error("%s cannot be started: %s", web.name, error)
                    web.postpone(now)
                else:
                    log.info("%s started again", web.name)

    def reopen_logs(self) -> None:
        """Has all processes open their log files again."""
        for web in self.gunicorns:
            web.reopen_logs()

    def stop(self) -> None:
        """Tells them to end what is under way and to go."""
        for web in self.gunicorns:
            if web.child is not None:
                web.child.send_signal(signal.SIGTERM)

    def _start(self, web: Gunicorn) -> None:
        directory = self._directory
        child = web.start(directory.config_file, directory.path, directory.prefix, self._tls_fd)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_death(web))
        self._selector.register(web.ready_fd, selectors.EVENT_READ, lambda: self._on_booted(web))
        directory.add_child(child.identity, web.name)

    def _on_booted(self, web: Gunicorn) -> None:
        if not web.take_ready():
            self._selector.unregister(web.ready_fd)
        self._on_ready()

    def _on_death(self, web: Gunicorn) -> None:
        assert web.child is not None
        pid = web.child.pid
        self._selector.unregister(web.child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(web.ready_fd)
        reason = web.died(time.monotonic())
        self._directory.remove_child(pid)
        if not self._registry.draining:
            log.error("%s (pid %d) has ended (%s) and is started again", web.name, pid, reason)
