"""Starts the process of a model worker: a fork of the worker template, or another Python interpreter.

The child's side of the fork makes the process what handlers expect: its own session, plain signal handlers,
stdin empty, stdout and stderr as pipes to the template, nothing of the template's open, the model's folder as its
current directory. It never returns to the template's code.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import wsgi_ts
from wsgi_ts.batcher.spawn.environment import export_threads
from wsgi_ts.batcher.spawn.exit import WORKER_VARIABLE, worker_mark
from wsgi_ts.control.channel import Channel
from wsgi_ts.gpu.devices import visibility
from wsgi_ts.logs.setup import detach_logging
from wsgi_ts.messages import SpawnWorker
from wsgi_ts.process import die_with_parent, enable_fault_traces, set_process_title
from wsgi_ts.quick_dataclass import dataclass

#: Where a model worker finds its status socket, once all other descriptors are closed.
STATUS_FD = 3
#: When the machine runs out of memory the kernel takes a model worker, not a process that others depend on.
_OOM_SCORE_ADJ = "800"
#: Runs a model worker in an interpreter with packages of its own, which go before the server's.
#: Its current directory, the model's, would come before Python's own library: it does not count yet.
_BOOTSTRAP = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv.pop(1)]; import importlib; "
    "sys.exit(importlib.import_module(sys.argv.pop(1)).main())"
)

#: What runs in place of a model worker where the model spans several processes.
GROUP_ENTRY = "wsgi_ts.batcher.group.agent:run"

#: What a model worker runs: `wsgi_ts.batcher.worker.main.run` and whoever stands in for it.
Entry = Callable[[SpawnWorker, int], int]


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started process and the template's ends of what connects them; the template closes all three."""

    pid: int
    stdout: int
    stderr: int
    status: Channel


def load_entry(name: str) -> Entry:
    """The function called `module:function`.

    Raises:
        ImportError: no such module.
        AttributeError: no such function in it.
    """
    module, _, function = name.partition(":")
    entry: Entry = getattr(importlib.import_module(module), function)
    return entry


def spawn(order: SpawnWorker, entry: Entry) -> Spawned:
    """Starts a model worker.

    A spec that names a Python interpreter gets a process of it, one with ranks a group. `entry` is what a fork runs; of
    another interpreter's process it gives the module, whose `main` is run.

    Raises:
        OSError: no process or no descriptor is left.
    """
    parent = os.getpid()
    with contextlib.ExitStack() as undo:
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with contextlib.closing(theirs):
            out_read, out_write = _pipe(undo)
            err_read, err_write = _pipe(undo)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _child(order, entry, parent, (out_write, err_write, theirs.fileno()))
            os.close(out_write)
            os.close(err_write)
        undo.pop_all()
    ours.setblocking(False)
    os.set_blocking(out_read, False)
    os.set_blocking(err_read, False)
    return Spawned(pid, out_read, err_read, Channel(ours))


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        undo.callback(os.close, fd)
    return ends


def _child(order: SpawnWorker, entry: Entry, parent: int, fds: tuple[int, int, int]) -> NoReturn:
    """The child after the fork."""

    def live() -> int:
        os.setsid()
        die_with_parent(parent)
        reset_signals()
        _take_descriptors(*fds, inheritable=order.spec.python is not None)
        _become_worker(order)
        if order.spec.python is not None and not order.spec.ranks:
            _execute(order, order.spec.python, entry.__module__)
        refresh()
        life = load_entry(GROUP_ENTRY) if order.spec.ranks else entry
        return life(order, STATUS_FD)

    run_and_exit(live)


def run_and_exit(live: Callable[[], int]) -> NoReturn:
    """Runs what a fork was made for, which returns its exit code; nothing ever gets back into its parent's code."""
    code = 1
    try:
        code = live()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # nothing may get from here into the parent's loop
        traceback.print_exc()
    finally:
        # A handler may have closed or replaced these; there is nobody left to tell.
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def reset_signals() -> None:
    """Gives a fork the signal handlers that programs start with."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _take_descriptors(stdout: int, stderr: int, status: int, *, inheritable: bool) -> None:
    """Puts stdin, stdout, stderr and the status socket in their places and closes everything else.

    Python objects of the template that own a closed descriptor stay referenced until `os._exit`, so none of them
    closes the number again when a handler has it.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    # First out of the way of 0 to 3, then into place.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STATUS_FD + 1) for fd in (null, stdout, stderr, status)]
    for target, fd in enumerate(moved):
        os.dup2(fd, target, inheritable=inheritable or target < STATUS_FD)
    os.closerange(STATUS_FD + 1, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)


def _become_worker(order: SpawnWorker) -> None:
    """Names, marks, current directory, and what the kernel should know."""
    spec = order.spec
    os.environ[WORKER_VARIABLE] = worker_mark(order.prefix, order.worker_id, order.start_count)
    if order.devices is not None:
        os.environ.update(visibility(order.devices))
    role = "group" if spec.ranks else "model worker"
    set_process_title(f"wsgi-ts: {role} {order.worker_id} {spec.title} {spec.version}")
    with contextlib.suppress(OSError):  # not writable in some sandboxes; it is only advice
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)
    os.chdir(spec.model_dir)


def refresh() -> None:
    """Undoes what a fork should not share with its siblings: log handlers, buffers, random numbers."""
    detach_logging()
    # New objects: the old ones remember of what kind the template's stdout was.
    sys.stdout = sys.__stdout__ = _text_stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(2)  # type: ignore[misc]
    enable_fault_traces()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _text_stream(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _execute(order: SpawnWorker, python: str, module: str) -> NoReturn:
    """Becomes another interpreter that runs `module.main`; what it cannot find, the server's folders have."""
    server_folder = str(Path(wsgi_ts.__file__).parent.parent)
    export_threads(order.threads)
    words = [python, "-u", "-c", _BOOTSTRAP, server_folder, module, order.to_json(), str(STATUS_FD)]
    os.execv(python, words)
