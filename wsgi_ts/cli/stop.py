"""Stops a server: `torchserve --stop` by the pid file, `wsgi-ts stop` by the run directory."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from pathlib import Path

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import ServiceUnavailable
from wsgi_ts.instance.pid_file import ServerHandle, pid_file_path, read_pid, remove_pid_file
from wsgi_ts.instance.record import Record
from wsgi_ts.process import start_time

#: How long the end of a server is waited for, in seconds.
STOP_LIMIT_S = 60.0


def stop_server(run_dir: Path, *, wait: bool) -> int:
    """Stops the server that the pid file names, as `torchserve --stop` does; returns the exit status.

    Raises:
        ConfigError: the pid file cannot be read.
    """
    pid = read_pid(pid_file_path())
    handle = None if pid is None else ServerHandle.find(pid, run_dir)
    if handle is None:
        if pid is not None and start_time(pid) is None:
            print("Removing orphan pid file.")
            remove_pid_file(pid)
        print("TorchServe is not currently running.")
        return 0
    try:
        handle.send(signal.SIGTERM)
        Path("key_file.json").unlink(missing_ok=True)
        if not wait:
            print("TorchServe has stopped.")
        elif not handle.wait(STOP_LIMIT_S):
            print("Stopping TorchServe took too long.")
    except ProcessLookupError:
        print("TorchServe already stopped.")
    except PermissionError:
        print(f"TorchServe (pid {handle.pid}) belongs to another user; stop it as that user.")
        return 1
    finally:
        handle.close()
    remove_pid_file(handle.pid)
    return 0


def stop_instance(run_dir: Path, *, fast: bool, limit_s: float) -> int:
    """Stops the instance of a run directory, as `wsgi-ts stop` does; returns the exit status.

    Its end is waited for at most `limit_s` seconds, requests under way not if it is to be `fast`.
    """
    record = Record.find(run_dir)
    handle = None if record is None or record.pid is None else ServerHandle.find(record.pid, run_dir)
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
