"""How an instance logs: one plan, made by the supervisor and read by every other process.

A plan is a dictionary for `logging.config.dictConfig` that names the classes of `wsgi_ts.logs.setup`, so a user's log
configuration and the built-in one are the same thing to every process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from wsgi_ts.quick_dataclass import dataclass

FILE_CLASS = "wsgi_ts.logs.setup.FileHandler"
CONSOLE_CLASS = "wsgi_ts.logs.setup.ConsoleHandler"
FORMAT_CLASS = "wsgi_ts.logs.setup.LineFormatter"

#: The line formats of TorchServe: of ts_log.log, model_log.log and stdout, and of the other files.
TS_FORMAT = "%(asctime)s [%(levelname)-5s] %(threadName)s %(name)s - %(message)s"
PLAIN_FORMAT = "%(asctime)s - %(message)s"

#: The level that log4j calls ALL; 0 would mean "as the logger above".
LEVEL_ALL = 1
#: Above every level: OFF.
LEVEL_OFF = 100

#: Our loggers, whatever name a configuration knows them by.
OUR_LOGGERS = ("wsgi_ts", "org.pytorch.serve")

MAX_FILE_BYTES = 100 * 1024 * 1024
KEEP = 5


@dataclass(frozen=True, slots=True)
class LogPlan:
    """How an instance logs.

    Attributes:
        logging: for `logging.config.dictConfig`.
        asynchronous: lines are written by a background thread of each process.
        notes: what of the user's configuration is not obeyed, for the log.
    """

    logging: dict[str, Any]
    asynchronous: bool = False
    notes: tuple[str, ...] = field(default=())

    def write(self, path: Path) -> None:
        """Writes it for the other processes, readable for this user only; raises OSError where that fails."""
        text = json.dumps({"logging": self.logging, "asynchronous": self.asynchronous, "notes": self.notes}, indent=1)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)

    @classmethod
    def read(cls, path: Path) -> LogPlan:
        """Reads what `write` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: not a plan.
        """
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(fields["logging"], fields["asynchronous"], tuple(fields["notes"]))


def file_handler(
    filename: Path | str,
    formatter: str | None,
    *,
    max_bytes: int = MAX_FILE_BYTES,
    period: str = "day",
    keep: int = KEEP,
    archive: str = "",
) -> dict[str, Any]:
    """The row of a file that is rotated (see `wsgi_ts.logs.rotation.Rotation` for the last four).

    Args:
        filename: the file; relative to the current directory.
        formatter: name of its formatter.
        max_bytes: size from which it is rotated; 0 for any.
        period: at whose end it is rotated; empty for none.
        keep: how many rotated files stay.
        archive: name of a rotated file; relative to the file's directory.
    """
    path = Path(os.path.abspath(filename))
    row: dict[str, Any] = {"()": FILE_CLASS, "filename": str(path), "max_bytes": max_bytes, "period": period}
    folder = str(path.parent).replace("%", "%%")
    row |= {"keep": keep, "archive": os.path.join(folder, archive) if archive else default_archive(path)}
    if formatter is not None:
        row["formatter"] = formatter
    return row


def default_archive(path: Path) -> str:
    """The name that a rotated file gets, as TorchServe names it: `ts_log.21-Nov.log.gz`."""
    stem = path.name.removesuffix(".log").replace("%", "%%")
    return str(path.parent).replace("%", "%%") + f"/{stem}.%d-%b.log.gz"


def line_format(text: str, datefmt: str | None = None) -> dict[str, Any]:
    """The row of a formatter of ours (see `wsgi_ts.logs.setup.LineFormatter`)."""
    return {"()": FORMAT_CLASS, "fmt": text, "datefmt": datefmt}


def default_plan(log_dir: Path, metrics_dir: Path, *, asynchronous: bool = False, log_format: str = "text") -> LogPlan:
    """TorchServe's five files and stdout.

    Everything but the access log is shown in ts_log.log and on stdout as well, as TorchServe does.

    Args:
        log_dir: directory of the access, server and model log.
        metrics_dir: directory of the metrics logs.
        asynchronous: see `LogPlan`.
        log_format: with `json` the access log's lines are complete as they are.
    """
    access = "bare" if log_format == "json" else "plain"
    return LogPlan(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "ts": line_format(TS_FORMAT),
                "plain": line_format(PLAIN_FORMAT),
                "bare": line_format("%(message)s"),
            },
            "handlers": {
                "stdout": {"()": CONSOLE_CLASS, "formatter": "ts"},
                "ts_log": file_handler(log_dir / "ts_log.log", "ts"),
                "access_log": file_handler(log_dir / "access_log.log", access),
                "model_log": file_handler(log_dir / "model_log.log", "ts"),
                "ts_metrics": file_handler(metrics_dir / "ts_metrics.log", "plain"),
                "model_metrics": file_handler(metrics_dir / "model_metrics.log", "plain"),
            },
            "root": {"level": "INFO", "handlers": ["stdout", "ts_log"]},
            "loggers": {
                **{name: _logger("DEBUG", ()) for name in OUR_LOGGERS},
                "ACCESS_LOG": {**_logger("INFO", ("access_log",)), "propagate": False},
                "MODEL_LOG": _logger(LEVEL_ALL, ("model_log",)),
                "MODEL_METRICS": _logger(LEVEL_ALL, ("model_metrics",)),
                "TS_METRICS": _logger(LEVEL_ALL, ("ts_metrics",)),
            },
        },
        asynchronous,
    )


def _logger(level: int | str, handlers: Sequence[str]) -> dict[str, Any]:
    return {"level": level, "handlers": list(handlers), "propagate": True}
