"""Which process is the running server: TorchServe's pid file, and how a process is known to be ours.

A pid alone proves nothing: the process may be gone and its number given to another program. It counts as our
server only if its command line says so, or if the run directory's record names it with the same start time;
nothing else is ever signalled.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import tempfile
from pathlib import Path
from types import TracebackType

from wsgi_ts.instance.record import Record
from wsgi_ts.process import command_line, is_readable, start_time
from wsgi_ts.settings.config import ConfigError

GUARD_MODULE = "wsgi_ts.guard"
SERVER_MODULE = "wsgi_ts.supervisor"
#: The word of a command line by which programs know TorchServe's server, SageMaker's serving toolkit among them.
TORCHSERVE_MARK = "org.pytorch.serve.ModelServer"
#: What marks a server in a command line: a guard, a server of a version that had none, and TorchServe's own, which uses
#: the same pid file.
SERVER_MARKS = (GUARD_MODULE, SERVER_MODULE, "wsgi_ts.server", TORCHSERVE_MARK)
_PID_FILE = ".model_server.pid"
#: Linux gives no higher pid.
_MAX_PID = 2**22
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


log = logging.getLogger(__name__)


def pid_file_path() -> Path:
    """Where TorchServe keeps the pid of the server."""
    return Path(tempfile.gettempdir()) / _PID_FILE


def read_pid(path: Path) -> int | None:
    """The pid in a pid file, None where it is missing or holds none; raises ConfigError where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"pid file {path} cannot be read: {error.strerror}; remove it") from None
    try:
        return parse_pid(os.read(fd, 64).decode("ascii", "replace").strip())
    except IsADirectoryError:
        raise ConfigError(f"pid file {path} is a directory; remove it") from None
    finally:
        os.close(fd)


def remove_pid_file(pid: int) -> None:
    """Removes the pid file if it names the process `pid`, and no server that was started meanwhile."""
    path = pid_file_path()
    try:
        if read_pid(path) == pid:
            path.unlink(missing_ok=True)
    except (ConfigError, OSError) as error:
        log.warning("pid file %s: %s", path, error)


def is_server(pid: int, run_dir: Path) -> bool:
    """Whether a process is a running model server."""
    if start_time(pid) is None:
        return False
    arguments = command_line(pid)
    record = Record.find(run_dir)
    return any(mark in arguments for mark in SERVER_MARKS) or (
        record is not None and record.pid == pid and record.is_running
    )


class ServerHandle:
    """A running server, held by pidfd: a signal can never reach another process that got the same number."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    @classmethod
    def find(cls, pid: int, run_dir: Path) -> ServerHandle | None:
        """The handle, or None if the process is gone or is no server."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        except OSError as error:
            raise ConfigError(f"pidfd_open: {error.strerror}; it takes Linux 5.3 or newer") from None
        # Checked after the descriptor is open: from here on the number means this process.
        if is_server(pid, run_dir):
            return cls(pid, pidfd)
        os.close(pidfd)
        return None

    def send(self, signum: signal.Signals) -> None:
        """Sends a signal.

        Raises:
            ProcessLookupError: it has exited.
            PermissionError: it belongs to another user.
        """
        signal.pidfd_send_signal(self._pidfd, signum)

    def wait(self, limit_s: float) -> bool:
        """Whether the process has exited, after waiting for it at most `limit_s` seconds."""
        return is_readable(self._pidfd, limit_s)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._pidfd)


class PidFile:
    """TorchServe's pid file: the decimal pid of the server, and nothing else.

    Used as a context manager: inside, the file is open and locked, so that of two starts at the same time one
    waits its turn and then finds the other's server.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> PidFile:
        while True:
            self._fd = self._open()
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self._is_current():
                return self
            # A stopping server removed the file between our open and our lock.
            os.close(self._fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.fstat(self._fd).st_size == 0 and self._is_current():
            os.unlink(self.path)
        os.close(self._fd)
        self._fd = -1

    def content(self) -> str:
        """What the file says, blanks stripped; empty for a new file."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def pid(self) -> int | None:
        """The pid in the file; None where it holds no number."""
        return parse_pid(self.content())

    def write(self, pid: int) -> None:
        """Puts a pid in the place of what the file said."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(pid).encode(), 0)

    def hand_down(self) -> int:
        """The locked file's descriptor, for a program that this process becomes: it closes it when it is known."""
        os.set_inheritable(self._fd, True)
        return self._fd

    def clear(self) -> None:
        """Empties the file; it is removed at the end of the block."""
        os.ftruncate(self._fd, 0)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ConfigError(f"pid file {self.path} is a symbolic link; remove it, and start again") from None
            raise ConfigError(
                f"pid file {self.path} cannot be written: {error.strerror}; remove it, or set another TMPDIR"
            ) from None

    def _is_current(self) -> bool:
        try:
            named = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._fd))


def parse_pid(text: str) -> int | None:
    """The number in a pid file; None for anything that is not a plain positive number."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(_MAX_PID)):
        return None
    pid = int(text)
    return pid if 0 < pid <= _MAX_PID else None
