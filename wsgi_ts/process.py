"""Processes: tying one's life to its parent, knowing one again by pid and start time, ending it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: Names the process whose death ends the child; set by `supervisor.child_process.Child`, taken by `die_with_parent`.
PARENT_PID_VARIABLE = "WSGI_TS_PARENT_PID"
#: Holds the instance's prefix in the environment of every process of an instance.
INSTANCE_VARIABLE = "WSGI_TS_INSTANCE"
#: Holds the key store's password.
PASSWORD_VARIABLE = "TS_KEYSTORE_PASS"
#: What is for the supervisor alone: the password, and systemd's and gunicorn's own variables.
_NOT_INHERITED = (
    PASSWORD_VARIABLE,
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "GUNICORN_CMD_ARGS",
)
#: More open files than this a process does not ask for.
OPEN_FILES = 65536
_PR_SET_PDEATHSIG = 1
_SS_DISABLE = 2
_PROC = Path("/proc")
#: How long a process may take to become another program, in seconds.
_EXEC_LIMIT_S = 1.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, by pid and start (in clock ticks since boot): a pid alone is given to others again."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of a process, None where there is none (or only a zombie)."""
        started = start_time(pid)
        return None if started is None else cls(pid, started)

    def is_alive(self) -> bool:
        """Whether exactly this process still runs."""
        return start_time(self.pid) == self.start_time

    def kill(self) -> None:
        """Kills it with SIGKILL if it still runs; another process that has got its pid is never touched."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except (ProcessLookupError, OSError):
            return
        try:
            # The pidfd holds whatever has the pid now; the check comes after, so nothing changes in between.
            if self.is_alive():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            log.warning("Cannot kill process %d: %s", self.pid, error)
        finally:
            os.close(pidfd)


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where it does not run (any more)."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The second field is the name in brackets, which may itself hold brackets and blanks.
    fields = text[text.rindex(b")") + 2 :].split()
    state, started = fields[0], int(fields[19])
    return None if state in (b"Z", b"X") else started


def command_line(pid: int) -> list[str]:
    """The arguments that a process was started with; none of one that has ended, or that cannot be looked at.

    A process that becomes another program has none for a moment, in which its parent knows already that it has: the
    kernel closes its descriptors before it gives it the new arguments. That is waited for.
    """
    limit = time.monotonic() + _EXEC_LIMIT_S
    while start_time(pid) is not None:
        try:
            found = (_PROC / str(pid) / "cmdline").read_bytes()
        except OSError:
            break
        if found or time.monotonic() > limit:  # the kernel's own have none for good
            return os.fsdecode(found).split("\0")
        time.sleep(0.001)
    return []


def boot_id() -> str:
    """A text that differs after each boot of the machine."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes, 0 where it does not run."""
    try:
        # Not by Path, which takes longer than the kernel does.
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def processes_of_instance(prefix: str) -> Iterator[ProcessIdentity]:
    """Finds the processes of an instance: they map its shared memory, or have its mark in their environment.

    `prefix`, the start of its shared-memory names, is random, so that nothing else has it.
    """
    marks = {"environ": f"{INSTANCE_VARIABLE}={prefix}", "maps": f"/dev/shm/{prefix}"}
    return _processes_with(marks)


def processes_mapping(prefix: str) -> Iterator[ProcessIdentity]:
    """Finds the processes that map shared memory whose name starts with `prefix`."""
    return _processes_with({"maps": f"/dev/shm/{prefix}"})


def _processes_with(marks: Mapping[str, str]) -> Iterator[ProcessIdentity]:
    """The other processes of this user that have one of the texts in that file of theirs in /proc."""
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        identity = ProcessIdentity.of(int(entry.name))
        if identity is None:
            continue
        for name, mark in marks.items():
            # Processes of other users cannot be read, and are not ours; others end while we look.
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / name).read_bytes():
                    yield identity
                    break


def wait_until_gone(processes: Sequence[ProcessIdentity], limit_s: float) -> list[ProcessIdentity]:
    """Waits until processes have ended, at most `limit_s` seconds; returns those that have not."""
    deadline = time.monotonic() + limit_s
    while alive := [process for process in processes if process.is_alive()]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return alive


def is_readable(fd: int, limit_s: float = 0.0) -> bool:
    """Whether a descriptor can be read, after waiting for that at most `limit_s` seconds.

    A pidfd can when its process has ended, a socket when its peer has sent something or closed it.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(limit_s * 1000))


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ties this process to its parent: it is killed when the parent thread that started it ends.

    Call it first of all in a child's main function, or right after a fork. Ends the process if the parent is
    gone already. Without `parent_pid` it is the one in the environment, where `Child` put it; nothing happens to what
    was started by hand.
    """
    if parent_pid is None:
        text = os.environ.pop(PARENT_PID_VARIABLE, "")
        if not text.isdigit():
            return
        parent_pid = int(text)
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


class _SignalStack(ctypes.Structure):
    """The C type stack_t."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def raise_open_files_limit() -> None:
    """Lets this process, and those it forks, open as many files as its hard limit allows (at most OPEN_FILES).

    For processes that hold clients' connections. Never for those that run users' code: `select` takes no descriptor
    above 1023, so handlers keep the limit that the server was started with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def enable_fault_traces() -> None:
    """Has the interpreter print where it was when a SIGSEGV or its like ends it. Call before any fork.

    faulthandler gives the thread a small stack of its own for signals, and Python runs its handlers there too: two
    or three signals at once (each saves some 10 KB of registers on new processors) overflow it and kill a healthy
    process. So it is taken away again, and signals use the thread's ordinary stack.
    """
    faulthandler.enable()
    none = _SignalStack(None, _SS_DISABLE, 0)
    if _libc.sigaltstack(ctypes.byref(none), None) != 0:
        raise OSError(ctypes.get_errno(), "sigaltstack failed")


def inherited_environ() -> dict[str, str]:
    """The environment variables that other programs get from the supervisor."""
    return {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}


def set_process_title(title: str) -> None:
    """Sets what ps and top show."""
    # Only now: the doctor says where it is missing.
    import setproctitle

    setproctitle.setproctitle(title)


def exit_reason(returncode: int) -> str:
    """A return code as `subprocess` counts it, in words: "exit code 3", "killed by SIGSEGV"."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter.

    The current directory is not searched for modules (a `random.py` of the user's may be there), unless this very
    package is run from its source tree.
    """
    in_source_tree = Path(__file__).resolve().parent.parent == Path.cwd()
    safe = sys.version_info >= (3, 11) and not in_source_tree
    return [sys.executable, *(["-P"] if safe else []), "-m", module, *arguments]
