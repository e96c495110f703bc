"""`wsgi-ts upgrade`: puts another version, or another configuration, in a running server's place.

The guard goes on, with the listening sockets, the models and the tokens: it starts this installation's supervisor when
the one before has answered what is under way. Who connects meanwhile waits until the models are loaded again; nobody is
refused. The way back is the same command of the other version. A new one that never serves is followed by the old one.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from wsgi_ts import __version__
from wsgi_ts.cli.start import supervisor_command
from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import ServerError
from wsgi_ts.instance.pid_file import ServerHandle
from wsgi_ts.instance.record import Record
from wsgi_ts.plugins.presence import has_plugins
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.sources import CommandLine, load_config

#: How long the new server's start is waited for, in seconds: its models are loaded before it serves.
UPGRADE_LIMIT_S = 600.0
_LOOK_EVERY_S = 0.2


def upgrade(command_line: CommandLine, run_dir: Path, *, limit_s: float) -> int:
    """Upgrades the instance of a run directory, and waits until the new server serves; returns the exit status.

    `command_line` has the flags of `serve`: the new configuration. The wait ends after `limit_s` seconds.

    Raises:
        ConfigError: the new configuration makes no sense; the server is not touched.
    """
    config = load_config(command_line, os.environ)
    if has_plugins(config):
        # Only then: with all that a plugin may be.
        from wsgi_ts.plugins.probe import with_plugins

        config = with_plugins(config)
    for warning in config.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    record = Record.find(run_dir)
    handle = None if record is None or record.pid is None else ServerHandle.find(record.pid, run_dir)
    if handle is None:
        print(f"Not running (run directory {run_dir}).")
        return 1
    with closing(handle):
        return _upgrade(config, run_dir, handle, time.monotonic() + limit_s)


def _upgrade(config: Config, run_dir: Path, guard: ServerHandle, until: float) -> int:
    before = _status(run_dir)
    if before is None:
        print(f"The server of {run_dir} does not answer; it is starting or stopping.", file=sys.stderr)
        return 1
    try:
        with closing(ControlPlane(run_dir)) as supervisor:
            supervisor.call("replace", command=supervisor_command(), config=config.to_json(), fixed=config.fixed)
    except ServerError as error:
        print(error.message, file=sys.stderr)
        return 1
    lives = _lives(before)
    while time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
        now = _status(run_dir)
        if now is not None and now["started"] and _lives(now) > lives:
            if _lives(now) == lives + 1:
                print(f"Upgraded from {before['version']} to {__version__}.")
                return 0
            print(f"{__version__} cannot serve, see its log; {now['version']} goes on.", file=sys.stderr)
            return 1
        if guard.wait(0):
            print("The server has ended; see its log.", file=sys.stderr)
            return 1
    print("The new server does not serve yet; see 'wsgi-ts status' and its log.", file=sys.stderr)
    return 1


def _status(run_dir: Path) -> dict[str, Any] | None:
    """What `wsgi-ts status` would say; None where nobody answers."""
    try:
        with closing(ControlPlane(run_dir)) as supervisor:
            found: dict[str, Any] = supervisor.call("status", timeout_s=5.0)
            return found
    except ServerError:
        return None


def _lives(status: dict[str, Any]) -> int:
    """How many supervisors the guard has started."""
    return next(int(each["starts"]) for each in status["processes"] if each["role"] == "supervisor")
