"""The supervisor's side of one gunicorn: its process on sockets that outlive it, and when it is ready."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.config import Config
from wsgi_ts.listeners import BoundListener
from wsgi_ts.process import INSTANCE_VARIABLE, Child, RestartBackoff, python_command

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
        """Starts the next life; `tls_fd` is a file with what https listeners take, -1 for none."""
        self.restart_at = float("inf")
        self._starts += 1
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
        return self.child

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


def plan_web_tier(config: Config, listeners: Sequence[BoundListener]) -> list[Gunicorn]:
    """One gunicorn for what carries predictions, one for the rest if there is any."""
    inference = [listener for listener in listeners if "inference" in listener.kinds]
    others = [listener for listener in listeners if "inference" not in listener.kinds]
    tier = [Gunicorn("inference", inference, config.web_workers)]
    if others:
        tier.append(Gunicorn("management", others, 1))
    return tier
