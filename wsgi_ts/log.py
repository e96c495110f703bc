"""Log files and their line formats: the five files of TorchServe, written by many processes at once.

Each line is one `write` to a descriptor opened with O_APPEND, so the lines of different processes never mix.
A log that cannot be written (full disk, closed terminal) loses lines and never stops a server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

ACCESS_LOG = "ACCESS_LOG"
MODEL_LOG = "MODEL_LOG"
#: TorchServe's logger names, where its own tests or people's scripts search for them.
_LEVEL_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
_STDOUT_FD = 1
_current_second = (0, "")


def timestamp(now: float | None = None) -> str:
    """The time of a line, local, like `2026-11-21T09:13:00,123`.

    Args:
        now: seconds since the epoch; None for the present.
    """
    global _current_second  # noqa: PLW0603 (a cache: formatting a date costs more than the rest of a line)
    moment = time.time() if now is None else now
    whole = int(moment)
    second, text = _current_second
    if second != whole:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(whole))
        _current_second = (whole, text)
    return f"{text},{int((moment - whole) * 1000):03d}"


def ts_line(level: str, thread: str, logger: str, message: str, now: float | None = None) -> str:
    """One line of ts_log.log, model_log.log and stdout, with its line end."""
    return f"{timestamp(now)} [{level:<5}] {thread} {logger} - {message}\n"


def plain_line(message: str, now: float | None = None) -> str:
    """One line of access_log.log, ts_metrics.log and model_metrics.log, with its line end."""
    return f"{timestamp(now)} - {message}\n"


def access_message(remote: str, method: str, uri: str, version: str, *, status: int, duration_ms: int) -> str:
    """The message of an access line.

    Args:
        remote: the client, like `/127.0.0.1:51234`.
        method: as the client sent it.
        uri: path and query as the client sent them.
        version: `HTTP/1.1`.
        status: of the answer.
        duration_ms: from the request's head to the answer's, in milliseconds.
    """
    return f'{remote} "{method} {uri} {version}" {status} {duration_ms}'


class LogFile:
    """One file that is appended to. If it cannot be opened it stays closed, and its lines go nowhere."""

    def __init__(self, path: Path) -> None:
        """Opens the file; creates it and its directory where they are not there."""
        self.path = path
        self.lost = 0
        self._fd = -1
        self.reopen()

    @property
    def is_open(self) -> bool:
        """Whether lines reach the file."""
        return self._fd >= 0

    def write(self, data: bytes) -> None:
        """Appends whole lines with one write."""
        if self._fd >= 0 and not _write(self._fd, data):
            self.lost += data.count(b"\n")

    def reopen(self) -> None:
        """Opens the file under its name again, after somebody has moved it away."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, flags, 0o644)
        except OSError:
            return
        old, self._fd = self._fd, fd
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Closes it; further lines go nowhere."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The five files of an instance."""

    ts: LogFile
    access: LogFile
    model: LogFile
    ts_metrics: LogFile
    model_metrics: LogFile

    @classmethod
    def open(cls, log_dir: Path, metrics_dir: Path) -> LogFiles:
        """Opens all five and creates those that are not there; what cannot be opened stays closed."""
        return cls(
            ts=LogFile(log_dir / "ts_log.log"),
            access=LogFile(log_dir / "access_log.log"),
            model=LogFile(log_dir / "model_log.log"),
            ts_metrics=LogFile(metrics_dir / "ts_metrics.log"),
            model_metrics=LogFile(metrics_dir / "model_metrics.log"),
        )

    def all(self) -> tuple[LogFile, ...]:
        """All five."""
        return (self.ts, self.access, self.model, self.ts_metrics, self.model_metrics)

    def reopen(self) -> None:
        """Opens all of them again (after rotation)."""
        for file in self.all():
            file.reopen()

    def unwritable(self) -> list[Path]:
        """The files that could not be opened."""
        return [file.path for file in self.all() if not file.is_open]


class _TsFormatter(logging.Formatter):
    """The format of ts_log.log; a traceback follows its line."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVEL_NAMES.get(record.levelno, record.levelname)
        thread = "main" if record.threadName in (None, "MainThread") else str(record.threadName)
        text = ts_line(level, thread, record.name, record.getMessage(), record.created)
        if record.exc_info:
            text += self.formatException(record.exc_info) + "\n"
        return text


class _TsHandler(logging.Handler):
    """Writes to ts_log.log and to stdout."""

    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._file = file
        self.setFormatter(_TsFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = self.format(record).encode("utf-8", "backslashreplace")
        except (TypeError, ValueError):
            self.handleError(record)
            return
        write_stdout(data)
        self._file.write(data)


def setup_logging(log_dir: Path, metrics_dir: Path) -> LogFiles:
    """Sends this process's loggers to ts_log.log and stdout. Call once, at the start of a process.

    Args:
        log_dir: directory of the access, server and model log.
        metrics_dir: directory of the metrics logs.

    Returns:
        The open files; keep them to reopen them on SIGUSR1.
    """
    files = LogFiles.open(log_dir, metrics_dir)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_TsHandler(files.ts))
    root.setLevel(logging.INFO)
    logging.getLogger("wsgi_ts").setLevel(logging.DEBUG)
    # Lines that the logging module itself would print about a broken handler are of no use to anybody.
    logging.raiseExceptions = False
    for path in files.unwritable():
        logging.getLogger(__name__).warning("Cannot write %s: going on without it", path)
    return files


def write_stdout(data: bytes) -> None:
    """Writes whole lines to stdout; a reader that is gone or stuck full loses them."""
    _write(_STDOUT_FD, data)


def _write(fd: int, data: bytes) -> bool:
    with contextlib.suppress(OSError):
        written = os.write(fd, data)
        while written < len(data):
            written += os.write(fd, data[written:])
        return True
    return False
