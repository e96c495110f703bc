"""`python -m wsgi_ts.web`: gunicorn with our worker class, on sockets that the supervisor has bound.

One process serves predictions (`--kind inference`), one the management and metrics APIs (`--kind
management`). All of gunicorn's settings are made here; no gunicorn file and no GUNICORN_CMD_ARGS is read.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from wsgi_ts.instance.instance import Instance, begin_process
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.process import die_with_parent, set_process_title
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.rest.apps import KINDS, build_app
from wsgi_ts.security.tls import listener_context
from wsgi_ts.web.gunicorn_config import both, read_gunicorn_config

#: How long a web worker may be silent before the arbiter kills it, in seconds.
WORKER_TIMEOUT_S = 30
#: What a web worker gets after `graceful_timeout` to answer what it could not wait for, in seconds.
WORKER_STOP_MARGIN_S = 2
#: Where workers keep the file of their heartbeat, if it is there: never on a disk that can block.
_MEMORY_DIRECTORY = Path("/dev/shm")
_log_files: LogFiles | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket by its descriptor, and the APIs that are served on it."""

    kinds: tuple[str, ...]
    fd: int

    @classmethod
    def parse(cls, text: str) -> Listener:
        """Reads `inference=5`, or `inference+management=5` where two APIs share an address.

        Raises:
            argparse.ArgumentTypeError: not of that form.
        """
        names, _, fd = text.partition("=")
        kinds = tuple(names.split("+"))
        if not fd.isdigit() or not set(kinds) <= set(KINDS):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form inference=FD")
        return cls(kinds, int(fd))


class GunicornLogger(Logger):  # type: ignore[misc]
    """gunicorn's log lines, from warnings on, in ours."""

    def setup(self, cfg: Any) -> None:
        """Leaves the handlers to `setup_logging`."""
        self.cfg = cfg
        self._access_log_enabled = False
        self.loglevel = logging.WARNING
        self.error_log.setLevel(logging.WARNING)
        self.error_log.propagate = True

    def reopen_files(self) -> None:
        """Opens the log files again (SIGUSR1)."""
        if _log_files is not None:
            _log_files.reopen()

    def close_on_exec(self) -> None:
        """Nothing to do: our files are opened so."""


class QuietArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's arbiter, but the supervisor owns its sockets, and starts a new one where that is needed."""

    def start(self) -> None:
        """Starts; from then on the sockets count as handed over, so their names are not removed at the end."""
        super().start()
        self.systemd = True

    def handle_usr2(self) -> None:
        """Ignores SIGUSR2."""


class WebApplication(BaseApplication):  # type: ignore[misc]
    """The application object that gunicorn and our worker class ask.

    Attributes:
        instance, kind: for the worker class.
        context: the TLS settings of the https listeners, None where there are none.
    """

    def __init__(
        self,
        instance: Instance,
        kind: str,
        listeners: Sequence[Listener],
        ready_fd: int,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Prepares gunicorn's configuration.

        `ready_fd` is a pipe into which each web worker writes one byte when it has booted; -1 for none.
        """
        self.context = context
        self.instance = instance
        self.kind = kind
        self._listeners = tuple(listeners)
        self._ready_fd = ready_fd
        self._apps: dict[Any, Callable[..., Any]] = {}
        # gunicorn closes the descriptors when it has copied them: who serves what is found by the address.
        self._kinds = {_address_of_fd(listener.fd): listener.kinds for listener in listeners}
        super().__init__()

    def load_config(self) -> None:
        """Sets all that differs from gunicorn's defaults."""
        config = self.instance.config
        values: dict[str, Any] = {
            "bind": [f"fd://{listener.fd}" for listener in self._listeners],
            "worker_class": "wsgi_ts.web.worker.WebWorker",
            "workers": config.web_workers if self.kind == "inference" else 1,
            "preload_app": True,
            "control_socket_disable": True,
            "timeout": WORKER_TIMEOUT_S,
            # The worker class keeps the limit itself, and answers what is left; the arbiter's is only the last resort.
            "graceful_timeout": config.graceful_timeout + WORKER_STOP_MARGIN_S,
            "worker_tmp_dir": str(_MEMORY_DIRECTORY) if os.access(_MEMORY_DIRECTORY, os.W_OK) else None,
            "logger_class": GunicornLogger,
            "proc_name": f"wsgi-ts {self.kind}",
            "post_fork": _post_fork,
            "post_worker_init": self._post_worker_init,
        }
        if config.gunicorn_config is not None:
            report = PluginReport(self.instance.run_dir, f"gunicorn {self.kind}")
            hooks = read_gunicorn_config(config.gunicorn_config, report)
            for name in ("post_fork", "post_worker_init"):
                hooks[name] = both(values[name], hooks.get(name))
            values |= hooks
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        """Builds the app of every listener before the web workers are forked; returns the first.

        What they all need is imported here too, so that they have it in common.
        """
        for address, kinds in self._kinds.items():
            self._apps[address] = build_app(kinds, self.instance)
        if self.kind == "inference":
            import_module("numpy")  # what `SlotClient` finds answers with
        gc.freeze()
        return next(iter(self._apps.values()))

    def app_for(self, sock: Any) -> Callable[..., Any]:
        """Returns the WSGI app of a listening socket of the worker.

        Raises:
            KeyError: the socket is none of the listeners.
        """
        self.wsgi()
        return self._apps[sock.getsockname()]

    def kinds_for(self, sock: Any) -> tuple[str, ...]:
        """Returns the APIs that are served on a listening socket of the worker."""
        return self._kinds[sock.getsockname()]

    def run(self) -> None:
        """Serves until a signal ends it; leaves with gunicorn's exit code."""
        QuietArbiter(self).run()

    def _post_worker_init(self, worker: Any) -> None:
        if self._ready_fd >= 0:
            # A supervisor that is gone kills us anyhow.
            with contextlib.suppress(OSError):
                os.write(self._ready_fd, b"+")


def _post_fork(arbiter: Any, worker: Any) -> None:
    """In a new web worker: it ends with its arbiter, so no old worker serves beside a new arbiter's."""
    die_with_parent(arbiter.pid)
    set_process_title(f"wsgi-ts: web worker {arbiter.app.kind}")


def _address_of_fd(fd: int) -> Any:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.getsockname()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one gunicorn until it is told to stop."""
    global _log_files  # noqa: PLW0603 (gunicorn makes the logger that reopens them itself)
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.web", description=__doc__)
    parser.add_argument("--kind", choices=("inference", "management"), required=True)
    parser.add_argument("--listener", type=Listener.parse, action="append", required=True)
    options, instance = begin_process(parser, arguments)
    _log_files = instance.log_files
    sys.argv = sys.argv[:1]
    context = None
    if options.tls_fd >= 0:
        context = listener_context(options.tls_fd, instance.config)
        os.close(options.tls_fd)
    WebApplication(instance, options.kind, options.listener, options.ready_fd, context).run()
