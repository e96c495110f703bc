"""Logging in one process: sets up what the plan says, and writes the lines that are made by the thousand.

Ordinary records go through the `logging` module. The access log, the output of model workers and the metrics go
through a `LineLog`: it obeys the same configuration, and formats once per call instead of once per line.
"""

from __future__ import annotations

import logging
import logging.config
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from wsgi_ts.logs.output import LogFile, Output, write_in_background
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.rotation import Rotation
from wsgi_ts.logs.text import safe_text
from wsgi_ts.quick_dataclass import dataclass

#: As TorchServe writes it; `{ms}` stands for the milliseconds, for which strftime has nothing.
ISO8601 = "%Y-%m-%dT%H:%M:%S,{ms}"
_LEVEL_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR", 5: "TRACE"}
#: Names the descriptor of the server's stderr in a process whose own is read by the supervisor
#: (`supervisor.child_output`): what is logged there does not go through the supervisor.
STDERR_VARIABLE = "WSGI_TS_STDERR_FD"
#: So many threads' frames a LineLog keeps: workers come and go.
_MAX_FRAMES = 256
_OUR_PREFIX = "wsgi_ts."
_current_second: dict[str, tuple[int, str]] = {}


@dataclass(slots=True)
class _Registry:
    """What `setup_logging` has made in this process: of dictConfig's handlers nothing else gets to know.

    Attributes:
        files: the open files by path: two handlers may name the same one.
        rotations: when each is rotated.
        loggers: those that the plan speaks of; the empty name is the root.
        console: the descriptors of the two streams.
    """

    files: dict[Path, LogFile] = field(default_factory=dict)
    rotations: dict[Path, Rotation] = field(default_factory=dict)
    loggers: set[str] = field(default_factory=set)
    console: dict[str, int] = field(default_factory=lambda: {"stdout": 1, "stderr": 2})

    def open(self, path: Path, rotation: Rotation) -> LogFile:
        """Opens a file, once."""
        self.rotations[path] = rotation
        if path not in self.files:
            self.files[path] = LogFile(path)
        return self.files[path]


_registry = _Registry()


def timestamp(now: float | None = None, datefmt: str = ISO8601) -> str:
    """The time of a line, local, like `2026-11-21T09:13:00,123`.

    `now` is in seconds since the epoch, by default the present; `datefmt` is for strftime, with `{ms}` for
    milliseconds.
    """
    moment = time.time() if now is None else now
    whole = int(moment)
    second, text = _current_second.get(datefmt, (0, ""))
    if second != whole:
        # Kept: formatting a date costs more than the rest of a line.
        text = time.strftime(datefmt, time.localtime(whole))
        _current_second[datefmt] = (whole, text)
    return text.replace("{ms}", f"{int((moment - whole) * 1000):03d}")


class SafeRecord(logging.LogRecord):
    """A record whose message cannot forge a line, whatever a client or a file put into it, and shows no secret.

    Its logger's name is that of a part of the server, as `wsgi_ts.supervisor`: in what module of it a line is made can
    change with every version.
    """

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(name, *args, **kwargs)
        if name is not None and name.startswith(_OUR_PREFIX):
            self.name = ".".join(name.split(".", 2)[:2])

    def getMessage(self) -> str:
        """The message on one line."""
        return safe_text(super().getMessage())


class SafeFormatter(logging.Formatter):
    """The formatter of the `logging` module, with tracebacks that cannot forge a record."""

    def formatException(self, ei: Any) -> str:
        """The traceback; a message with line ends stays on its line, so that it cannot pass for another record."""
        lines: list[str] = []
        for part in traceback.TracebackException(*ei).format():
            # Indented parts are source code, the others hold what was raised.
            lines += [part.rstrip("\n")] if part[:1].strip() else part.split("\n")[:-1]
        return "\n".join(map(safe_text, lines))


class LineFormatter(SafeFormatter):
    """The formats of TorchServe, and what a log4j pattern is translated to.

    Args:
        fmt: %-style, with `asctime`, `levelname`, `threadName`, `name`, `short_name`, `message`, `process`.
        datefmt: see `timestamp`.
    """

    def __init__(self, fmt: str, datefmt: str | None = None) -> None:
        super().__init__(fmt, validate=False)
        self._template = fmt
        self._datefmt = datefmt or ISO8601

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the lines of a traceback below it."""
        level = record.levelno
        text = self._template % {
            "asctime": timestamp(record.created, self._datefmt),
            "levelname": _LEVEL_NAMES.get(level, record.levelname),
            "threadName": "main" if record.threadName in (None, "MainThread") else record.threadName,
            "name": record.name,
            "short_name": record.name.rpartition(".")[2],
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        return f"{text}\n{record.exc_text}" if record.exc_text else text


class OutputHandler(logging.Handler):
    """Writes to an output of ours."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    def handle(self, record: logging.LogRecord) -> bool:
        """Writes one record that no filter holds back; returns whether none did.

        As logging's own, but for the lock: between its `acquire` and its `try` an exception that another thread sends
        (`plugins.threads.ThreadCall`) would leave that locked for ever.
        """
        passed = self.filter(record)
        if not passed:
            return False
        assert self.lock is not None
        with self.lock:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        try:
            data = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        except (TypeError, ValueError, KeyError):
            self.handleError(record)
            return
        self.output.write(data)

    def frame(self, record: logging.LogRecord) -> tuple[str, str] | None:
        """What stands before and after each message of the same level, thread and time; None where that is open.

        `record` has the message NUL.
        """
        # A formatter of the user's own may do anything with a message.
        if self.formatter is not None and type(self.formatter) not in (LineFormatter, SafeFormatter):
            return None
        before, _, after = self.format(record).partition("\0")
        return before, f"{after}\n"


class FileHandler(OutputHandler):
    """Appends to a file, by its absolute name, that all processes share; the supervisor rotates it (`Rotation`)."""

    def __init__(self, filename: str, max_bytes: int, period: str, keep: int, archive: str) -> None:
        super().__init__(_registry.open(Path(filename), Rotation(max_bytes, period, keep, archive)))


class ConsoleHandler(OutputHandler):
    """Writes to `stdout` or `stderr`; a reader that is gone loses lines."""

    def __init__(self, target: str = "stdout") -> None:
        super().__init__(Output(_registry.console[target]))


class LineLog:
    """One of TorchServe's loggers whose lines are made by the thousand."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._handlers = _handlers_of(self._logger)
        self._frames: dict[tuple[int, str], tuple[int, list[tuple[str, str] | None]]] = {}

    def is_on(self, level: int = logging.INFO) -> bool:
        """Whether lines of this level go anywhere."""
        return bool(self._handlers) and self._logger.isEnabledFor(level)

    def write(self, messages: Sequence[str], level: int = logging.INFO, thread: str = "main") -> None:
        """Writes one line for each message, all with the present time, in one system call for each output.

        Args:
            messages: on one line each, and clean (`text`): they are written as they are.
            level: one of `logging`'s.
            thread: what stands for the thread's name.
        """
        if not messages or not self.is_on(level):
            return
        for handler, frame in zip(self._handlers, self._frames_now(level, thread), strict=True):
            if level < handler.level:
                continue
            if frame is None:
                for message in messages:
                    handler.handle(self._record(message, level, thread))
                continue
            before, after = frame
            text = f"{before}{(after + before).join(messages)}{after}"
            assert isinstance(handler, OutputHandler)
            handler.output.write(text.encode("utf-8", "backslashreplace"))

    def _frames_now(self, level: int, thread: str) -> list[tuple[str, str] | None]:
        """Each handler's frame; kept for a millisecond, since a busy process writes many times in one."""
        now_ms = time.time_ns() // 1_000_000
        known_ms, frames = self._frames.get((level, thread), (0, []))
        if known_ms != now_ms:
            record = self._record("\0", level, thread)
            frames = [each.frame(record) if isinstance(each, OutputHandler) else None for each in self._handlers]
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            self._frames[level, thread] = (now_ms, frames)
        return frames

    def _record(self, message: str, level: int, thread: str) -> logging.LogRecord:
        record = logging.LogRecord(self._logger.name, level, "", 0, message, None, None)
        record.threadName = thread
        return record


def _handlers_of(logger: logging.Logger) -> list[logging.Handler]:
    """The handlers that a record of this logger reaches."""
    found: list[logging.Handler] = []
    at: logging.Logger | None = logger
    while at is not None:
        found += at.handlers
        at = at.parent if at.propagate else None
    return found


@dataclass(frozen=True, slots=True)
class LogFiles:
    """What this process writes to besides `logging`, and the files behind all of it.

    Attributes:
        access, model, ts_metrics, model_metrics: TorchServe's loggers ACCESS_LOG, MODEL_LOG, TS_METRICS and
            MODEL_METRICS.
        life_cycle: the logger under which TorchServe tells what is wrong with a model worker's output.
        files: every open file.
        rotations: when each file is rotated.
    """

    access: LineLog
    model: LineLog
    ts_metrics: LineLog
    model_metrics: LineLog
    life_cycle: LineLog
    files: tuple[LogFile, ...]
    rotations: dict[Path, Rotation]

    def reopen(self) -> None:
        """Opens all of them again (after rotation)."""
        for file in self.files:
            file.reopen()

    def close(self) -> None:
        """Closes all of them."""
        for file in self.files:
            file.close()

    def unwritable(self) -> list[Path]:
        """The files that could not be opened."""
        return [file.path for file in self.files if not file.is_open]


def setup_logging(plan: LogPlan) -> LogFiles:
    """Sends this process's loggers where the plan says. Call once, at the start of a process.

    Returns:
        The open files; keep them to reopen them when they were rotated.

    Raises:
        ValueError: a handler or formatter of the plan cannot be made; the message names it, its cause says why.
    """
    _take_stderr()
    _registry.files.clear()
    _registry.rotations.clear()
    _registry.loggers.update(("", *plan.logging.get("loggers", ())))
    logging.setLogRecordFactory(SafeRecord)
    logging.config.dictConfig(plan.logging)
    # Lines that the logging module itself would print about a broken handler are of no use to anybody.
    logging.raiseExceptions = False
    write_in_background(plan.asynchronous)
    files = _log_files(tuple(_registry.files.values()), dict(_registry.rotations))
    for path in files.unwritable():
        logging.getLogger(__name__).warning("Cannot write %s: going on without it", path)
    return files


def no_log_files() -> LogFiles:
    """Returns what a process has that is not the server's own, and logs in its own way."""
    return _log_files((), {})


def _log_files(files: tuple[LogFile, ...], rotations: dict[Path, Rotation]) -> LogFiles:
    return LogFiles(
        access=LineLog("ACCESS_LOG"),
        model=LineLog("MODEL_LOG"),
        ts_metrics=LineLog("TS_METRICS"),
        model_metrics=LineLog("MODEL_METRICS"),
        life_cycle=LineLog("org.pytorch.serve.wlm.WorkerLifeCycle"),
        files=files,
        rotations=rotations,
    )


def _take_stderr() -> None:
    given = os.environ.pop(STDERR_VARIABLE, "")
    if given.isdigit():
        _registry.console["stderr"] = int(given)
        os.set_inheritable(int(given), False)


def logged_stderr() -> int:
    """The descriptor of the stderr that this process logs to: its own, or the one that it was given for that."""
    return _registry.console["stderr"]


def detach_logging() -> None:
    """Makes `logging` what it is in a fresh interpreter, for a model worker's user code. Call after a fork."""
    logging.setLogRecordFactory(logging.LogRecord)
    logging.raiseExceptions = True
    for name in _registry.loggers:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET if name else logging.WARNING)
        logger.propagate = True
