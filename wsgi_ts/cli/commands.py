"""The command lines: `torchserve`, as TorchServe has it, and `wsgi-ts` with what TorchServe lacks.

The launcher reads and checks the whole configuration, so that a mistake is reported where it was made, and starts the
server's guard (`guard`), or becomes it in the foreground. It imports nothing heavy: it has to be gone in a moment.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts import TORCHSERVE_VERSION, __version__
from wsgi_ts.control.memory_file import memory_file
from wsgi_ts.guard.protocol import FORWARDED
from wsgi_ts.instance.pid_file import (
    GUARD_MODULE,
    SERVER_MODULE,
    PidFile,
    ServerHandle,
    parse_pid,
    pid_file_path,
    recorded_pid,
)
from wsgi_ts.settings.config import Config, ConfigError, default_run_dir
from wsgi_ts.settings.sources import CommandLine, load_config

_STOP_LIMIT_S = 60.0


def torchserve(arguments: Sequence[str] | None = None) -> int:
    """The `torchserve` command.

    Args:
        arguments: the command line without the program's name; default: that of this process.

    Returns:
        The exit status.
    """
    options = torchserve_parser().parse_args(arguments)
    if options.version:
        print(f"TorchServe Version is {TORCHSERVE_VERSION}")
        return 0
    try:
        if options.stop:
            return _stop(PidFile(pid_file_path()), default_run_dir(), wait=options.foreground)
        return _start(_command_line(options), wait=options.foreground)
    except ConfigError as error:
        print(error)
        return 1


def wsgi_ts(arguments: Sequence[str] | None = None) -> int:
    """The `wsgi-ts` command; arguments and result as `torchserve`."""
    options = _wsgi_ts_parser().parse_args(arguments)
    run_dir = Path(os.path.abspath(options.run_dir)) if options.run_dir else default_run_dir()
    try:
        if options.command == "serve":
            return _start(_command_line(options), wait=True)
        if options.command == "doctor":
            from wsgi_ts.cli.doctor import run_doctor

            return run_doctor(_command_line(options), os.environ)
        if options.command == "stop":
            return _stop_instance(run_dir, fast=options.fast, limit_s=options.timeout)
        from wsgi_ts.cli.status import print_status

        return print_status(run_dir, as_json=options.json)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ts-config", metavar="FILE", help="configuration file (config.properties)")
    add("--model-store", metavar="DIR", help="directory of the model archives (here or in the file)")
    add("--workflow-store", metavar="DIR", help="directory of the workflow archives; default: the model store")
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="models to load at startup: archive or name=archive, or the word all",
    )
    add("--log-config", metavar="FILE", help="log configuration")
    add("--cpp-log-config", metavar="FILE", help="log configuration of the C++ backend (no effect)")
    add("--no-config-snapshots", "--ncs", action="store_true", help="neither write nor read snapshots")
    add("--plugins-path", "--ppath", metavar="DIR", help="Java plug-ins (no effect)")
    add("--disable-token-auth", "--dt", action="store_true", help="answer requests without a token")
    add("--enable-model-api", action="store_true", help="allow registering and unregistering over the API")


def torchserve_parser() -> argparse.ArgumentParser:
    """The flags of the `torchserve` command."""
    parser = argparse.ArgumentParser(prog="torchserve", description="Starts or stops the model server.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-v", "--version", action="store_true", help="print the version")
    action.add_argument("--start", action="store_true", help="start the server (the default)")
    action.add_argument("--stop", action="store_true", help="stop the running server")
    _add_start_flags(parser)
    parser.add_argument("--foreground", action="store_true", help="wait until the server has exited")
    return parser


def _wsgi_ts_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsgi-ts", description="Runs and examines the model server.")
    parser.add_argument("--version", action="version", version=f"wsgi-ts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start a server and wait for its end")
    _add_start_flags(serve)
    stop = commands.add_parser("stop", help="stop the running server and wait for its end")
    stop.add_argument("--fast", action="store_true", help="do not wait for requests under way")
    stop.add_argument("--timeout", type=float, default=_STOP_LIMIT_S, metavar="SECONDS", help="default: 60")
    status = commands.add_parser("status", help="show processes, models and workers")
    status.add_argument("--json", action="store_true", help="for programs")
    doctor = commands.add_parser("doctor", help="check whether this machine can run the configuration")
    _add_start_flags(doctor)
    for command in (serve, stop, status, doctor):
        command.add_argument("--run-dir", metavar="DIR", help="the instance's run directory")
    return parser


def _command_line(options: argparse.Namespace) -> CommandLine:
    return CommandLine(
        ts_config=options.ts_config,
        model_store=options.model_store,
        workflow_store=options.workflow_store,
        models=None if options.models is None else tuple(options.models),
        log_config=options.log_config,
        cpp_log_config=options.cpp_log_config,
        plugins_path=options.plugins_path,
        no_config_snapshots=options.no_config_snapshots,
        disable_token_auth=options.disable_token_auth,
        enable_model_api=options.enable_model_api,
        run_dir=getattr(options, "run_dir", None),
    )


def _start(command_line: CommandLine, *, wait: bool) -> int:
    """Starts a server; with `wait` this process becomes its guard and does not return."""
    if command_line.run_dir is not None:
        # An instance beside the one that the pid file names; the server locks its run directory.
        return _launch(load_config(command_line, os.environ), None, wait=wait)
    with PidFile(pid_file_path()) as pid_file:
        if _running_server(pid_file, default_run_dir()):
            print("TorchServe is already running, please use torchserve --stop to stop TorchServe.")
            return 1
        return _launch(load_config(command_line, os.environ), pid_file, wait=wait)


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
    return [*_python_command(), "-m", GUARD_MODULE, *arguments, "--", *_supervisor_command()]


def _supervisor_command() -> list[str]:
    return [*_python_command(), "-m", SERVER_MODULE]


def _python_command() -> list[str]:
    """The interpreter, told not to import from the current directory: a user's `random.py` may be there."""
    in_source_tree = Path(__file__).resolve().parents[2] == Path.cwd()
    safe = sys.version_info >= (3, 11) and not in_source_tree
    return [sys.executable, "-P"] if safe else [sys.executable]


def _stop(pid_file: PidFile, run_dir: Path, *, wait: bool) -> int:
    """Stops the server that the pid file names, as `torchserve --stop` does."""
    pid = parse_pid(_read_pid_file(pid_file.path))
    handle = None if pid is None else ServerHandle.find(pid, run_dir)
    if handle is None:
        print("TorchServe is not currently running.")
        return 0
    try:
        handle.send(signal.SIGTERM)
        Path("key_file.json").unlink(missing_ok=True)
        if not wait:
            print("TorchServe has stopped.")
        elif not handle.wait(_STOP_LIMIT_S):
            print("Stopping TorchServe took too long.")
    except ProcessLookupError:
        print("TorchServe already stopped.")
    except PermissionError:
        print(f"TorchServe (pid {handle.pid}) belongs to another user; stop it as that user.")
        return 1
    finally:
        handle.close()
    _remove_pid_file(pid_file.path, handle.pid)
    return 0


def _read_pid_file(path: Path) -> str:
    """What the pid file says; empty where it is missing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"pid file {path} cannot be read: {error.strerror}; remove it") from None
    try:
        return os.read(fd, 64).decode("ascii", "replace").strip()
    except IsADirectoryError:
        raise ConfigError(f"pid file {path} is a directory; remove it") from None
    finally:
        os.close(fd)


def _remove_pid_file(path: Path, pid: int) -> None:
    """Removes the pid file, unless a server that was started meanwhile has written its own."""
    if parse_pid(_read_pid_file(path)) == pid:
        path.unlink(missing_ok=True)


def _stop_instance(run_dir: Path, *, fast: bool, limit_s: float) -> int:
    """Stops the instance of a run directory and waits for its end, as `wsgi-ts stop` does."""
    from contextlib import closing

    from wsgi_ts.control.client import ControlPlane
    from wsgi_ts.errors import ServiceUnavailable

    pid = recorded_pid(run_dir)
    handle = None if pid is None else ServerHandle.find(pid, run_dir)
    if handle is None:
        print(f"Not running (run directory {run_dir}).")
        return 0
    try:
        try:
            with closing(ControlPlane(run_dir)) as supervisor:
                supervisor.call("stop", timeout_s=5.0, fast=fast)
        except ServiceUnavailable:
            # Still starting, or its control socket is stuck: the signal reaches it all the same.
            handle.send(signal.SIGTERM)
        if handle.wait(limit_s):
            print("Stopped.")
            return 0
        print(f"Still running after {limit_s:g} s (pid {handle.pid}); 'wsgi-ts stop --fast' does not wait.")
        return 1
    except ProcessLookupError:
        print("Stopped.")
        return 0
    except PermissionError:
        print(f"The server (pid {handle.pid}) belongs to another user; stop it as that user.", file=sys.stderr)
        return 1
    finally:
        handle.close()
