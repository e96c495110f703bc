"""Starts a server: `torchserve --start` and `wsgi-ts serve`.

The whole configuration is read and checked here, so that a mistake is reported where it was made. Then the server's
guard is started, or this process becomes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wsgi_ts.cli.activation import handed_sockets
from wsgi_ts.control.memory_file import memory_file
from wsgi_ts.guard.protocol import FORWARDED
from wsgi_ts.instance.pid_file import GUARD_MODULE, SERVER_MODULE, TORCHSERVE_MARK, PidFile, ServerHandle, pid_file_path
from wsgi_ts.plugins.presence import has_plugins
from wsgi_ts.process import python_command
from wsgi_ts.run_files import default_run_dir
from wsgi_ts.settings.config import Config, ConfigError
from wsgi_ts.settings.sources import CommandLine, load_config


def start(command_line: CommandLine, *, wait: bool) -> int:
    """Starts a server and returns the exit status; with `wait` this process becomes its guard, and does not return.

    Raises:
        ConfigError: the configuration makes no sense.
    """
    if command_line.run_dir is not None:
        # An instance beside the one that the pid file names; the server locks its run directory.
        return _launch(load_config(command_line, os.environ), None, wait=wait)
    with PidFile(pid_file_path()) as pid_file:
        if _running_server(pid_file, default_run_dir()):
            print("TorchServe is already running, please use torchserve --stop to stop TorchServe.")
            return 1
        return _launch(load_config(command_line, os.environ), pid_file, wait=wait)


def start_embedded(command_line: CommandLine, owner: int) -> int:
    """Starts a server in the background that is an engine of another process; returns the exit status.

    The server opens no addresses, and ends with the process `owner`. The command line names a run directory.

    Raises:
        ConfigError: the configuration makes no sense.
    """
    config = load_config(command_line, os.environ)
    return _launch(replace(config, embedded_in=owner), None, wait=False)


def _running_server(pid_file: PidFile, run_dir: Path) -> bool:
    """Whether the pid file names a running server; a file that names none is emptied."""
    pid = pid_file.pid()
    handle = None if pid is None else ServerHandle.find(pid, run_dir)
    if handle is not None:
        handle.close()
        return True
    if pid_file.content():
        print("Removing orphan pid file.")
        pid_file.clear()
    return False


def _check_temp_dir(config: Config) -> None:
    """Raises ConfigError where archives could not be opened: here, where a start in the background can still say so."""
    try:
        with tempfile.TemporaryFile(dir=config.temp_dir):
            return
    except OSError as error:
        reason = f"directory for temporary files {config.temp_dir}: cannot be written: {error.strerror}"
        raise ConfigError(f"{reason}; change its permissions, or set TEMP to another") from None


def _launch(config: Config, pid_file: PidFile | None, *, wait: bool) -> int:
    """Starts the server's guard, in the background or in the place of this process; the status is 0."""
    _check_temp_dir(config)
    if has_plugins(config):
        # Only then: with all that a plugin may be.
        from wsgi_ts.plugins.probe import with_plugins

        config = with_plugins(config)
    for warning in config.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    # What was printed so far comes before what the server prints.
    sys.stdout.flush()
    sys.stderr.flush()
    # The configuration may hold passwords: it never lies in a file that has a name.
    config_fd = memory_file("config", config.to_json().encode())
    # A signal that comes too early waits until the guard can pass it on.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGHUP})
    try:
        if wait:
            flags = ["--foreground"]
            for name, fd in handed_sockets(config, os.environ).items():
                flags += ["--kept", f"{name}={fd}"]
            if pid_file is not None:
                pid_file.write(os.getpid())
                flags += ["--pid-file-fd", str(pid_file.hand_down())]
            os.set_inheritable(config_fd, True)
            command = _guard_command(config, config_fd, flags)
            os.execv(command[0], command)
        process = subprocess.Popen(
            _guard_command(config, config_fd, []),
            stdin=subprocess.DEVNULL,
            pass_fds=(config_fd,),
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        os.close(config_fd)
    if pid_file is not None:
        pid_file.write(process.pid)
    return 0


def _guard_command(config: Config, config_fd: int, flags: Sequence[str]) -> list[str]:
    arguments = ["--config-fd", str(config_fd), "--run-dir", str(config.run_dir), *flags]
    arguments += ["--like", TORCHSERVE_MARK] if config.embedded_in is None else ["--owner", str(config.embedded_in)]
    return python_command(GUARD_MODULE, *arguments, "--", *supervisor_command())


def supervisor_command() -> list[str]:
    """The command of this version's supervisor, without what the guard adds."""
    return python_command(SERVER_MODULE)
