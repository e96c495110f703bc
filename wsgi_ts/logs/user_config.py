"""A user's log configuration (`--log-config`) becomes a plan: log4j's XML or properties, or Python's YAML, JSON or INI.

A Python configuration says only what differs from the built-in one; a log4j2.xml is the whole of it, as in log4j.
Files of either are opened for appending by every process and rotated by the supervisor, whatever class was named.
"""

from __future__ import annotations

import ast
import configparser
import copy
import inspect
import json
import logging
import logging.config
import logging.handlers
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.logs.log4j2 import parse, translate
from wsgi_ts.logs.log4j2_properties import parse_properties
from wsgi_ts.logs.notation import LogConfigError, level_number, substitute, with_our_names
from wsgi_ts.logs.plan import CONSOLE_CLASS, FILE_CLASS, LogPlan, default_plan, file_handler
from wsgi_ts.logs.rotation import PERIODS

_MAX_FILE_BYTES = 1024 * 1024
_FILE_CLASSES = {
    "logging.FileHandler": logging.FileHandler,
    "logging.handlers.WatchedFileHandler": logging.handlers.WatchedFileHandler,
    "logging.handlers.RotatingFileHandler": logging.handlers.RotatingFileHandler,
    "logging.handlers.TimedRotatingFileHandler": logging.handlers.TimedRotatingFileHandler,
}
_STREAMS = {"ext://sys.stdout": "stdout", "ext://sys.stderr": "stderr", "stdout": "stdout", "stderr": "stderr"}
#: TimedRotatingFileHandler's `when`.
_PERIOD_OF_WHEN = {"s": "second", "m": "minute", "h": "hour", "d": "day", "midnight": "day", "w": "week"}
#: The keys of a file's row in a configuration, and what they are called in ours.
_FILE_KEYS = {"maxBytes": "max_bytes", "backupCount": "keep", "when": "period"}


def load_plan(
    log_dir: Path,
    metrics_dir: Path,
    file: Path | None,
    environ: Mapping[str, str],
    *,
    asynchronous: bool = False,
    log_format: str = "text",
) -> LogPlan:
    """How an instance logs; see `default_plan`.

    `file` is the user's configuration, None for the built-in one, and `environ` for its `${env:NAME}`.

    Raises:
        LogConfigError: the file cannot be used.
    """
    plan = default_plan(log_dir, metrics_dir, asynchronous=asynchronous, log_format=log_format)
    if file is None:
        return plan
    text = _read(file)
    if file.suffix.lower() in (".xml", ".properties") or text.lstrip().startswith("<"):
        rows, notes = log4j_rows(file, text, environ)
    else:
        rows, notes = _python_config(file, text, plan.logging, environ)
    return LogPlan(rows, asynchronous, tuple(notes))


def log4j_rows(path: Path, text: str, environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A log4j2.xml or log4j2.properties as the rows of a plan, and what of it does not translate.

    Raises:
        LogConfigError: it cannot be used.
    """
    elements = parse_properties if path.suffix.lower() == ".properties" else parse
    return translate(path, elements(path, text), environ)


def log4j_file(vmargs: str) -> Path | None:
    """The file that Java arguments name with `-Dlog4j.configurationFile=`; None where they name none."""
    found = re.findall(r"(?:^|\s)-Dlog4j2?\.configurationFile=(?:file:(?://)?)?(\S+)", vmargs)
    return Path(found[-1]) if found else None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise LogConfigError(path, None, f"cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise LogConfigError(path, None, f"larger than {_MAX_FILE_BYTES} bytes; this is no log configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LogConfigError(path, line, "not UTF-8; save it as UTF-8") from None


def _python_config(
    path: Path, text: str, defaults: dict[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Puts a dictConfig or fileConfig on top of the built-in plan."""
    first = next((line for line in text.splitlines() if line.strip() and line.lstrip()[0] not in "#;"), "")
    is_ini = path.suffix.lower() in (".ini", ".cfg", ".conf") or re.fullmatch(r"\s*\[\w+\]\s*", first)
    given, line_of = _read_ini(path, text) if is_ini else _read_yaml(path, text)
    merger = _Merger(path, line_of, copy.deepcopy(defaults), environ)
    merger.merge(given)
    return merger.rows, merger.notes


LineOf = Callable[[str, str], "int | None"]


class _Merger:
    """Puts a user's rows on top of the built-in ones, row by row, and checks each.

    Attributes:
        rows: the result, for dictConfig.
        notes: what is not obeyed.
    """

    def __init__(self, path: Path, line_of: LineOf, rows: dict[str, Any], environ: Mapping[str, str]) -> None:
        self.rows = rows
        self.notes: list[str] = []
        self._path = path
        self._line_of = line_of
        self._environ = environ

    def merge(self, given: dict[str, Any]) -> None:
        """Takes over the user's rows; raises LogConfigError where one makes no sense."""
        known = {"version", "formatters", "filters", "handlers", "loggers", "root"}
        known |= {"disable_existing_loggers", "incremental"}
        for key in given.keys() - known:
            raise self._error(key, "", f"unknown key {key!r}; known are {', '.join(sorted(known))}")
        if given.get("version", 1) != 1 or given.get("incremental"):
            raise self._error("version", "", "only version 1 is known, and no incremental configuration")
        self.rows["filters"] = self._section(given, "filters")
        for name, row in self._section(given, "formatters").items():
            self.rows["formatters"][name] = self._formatter(row)
        for name, row in self._section(given, "handlers").items():
            self.rows["handlers"][name] = self._handler(name, row)
        loggers = with_our_names(self._section(given, "loggers"))
        for name, row in loggers.items():
            self.rows["loggers"][name] = self._logger(name, {**self.rows["loggers"].get(name, {}), **row})
        if given.get("root") is not None:
            self.rows["root"] = self._logger("root", {**self.rows["root"], **self._section(given, "root")})

    def _section(self, given: dict[str, Any], section: str) -> dict[str, Any]:
        rows = given.get(section) or {}
        if not isinstance(rows, dict):
            raise self._error(section, "", f"{section} is no table of names")
        for name, row in rows.items() if section != "root" else ():
            if not isinstance(row, dict):
                raise self._error(section, name, f"{section}: {name!r} is no table of keys")
        return {str(name): row for name, row in rows.items()}

    def _formatter(self, row: dict[str, Any]) -> dict[str, Any]:
        if "()" in row or "class" in row:
            return row
        fields = {"fmt": row.get("format"), "datefmt": row.get("datefmt"), "style": row.get("style", "%")}
        return {"()": "wsgi_ts.logs.setup.SafeFormatter", **fields}

    def _handler(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """A handler's row; files and streams become ours."""
        row = {key: self._substituted(name, value) for key, value in row.items()}
        if "class" not in row and "()" not in row:
            base = self.rows["handlers"].get(name)
            if base is None:
                raise self._error("handlers", name, f"handler {name!r} has no class")
            if "filename" in row:
                # The rotated files of a file that was moved lie beside it.
                base = {key: value for key, value in base.items() if key != "archive"}
            row = {**base, **row}
        else:
            row.setdefault("formatter", "ts")
        if "level" in row:
            row["level"] = self._level("handlers", name, row["level"])
        for key in ("()", "class", "formatter", "filename", "archive", "period", "when"):
            if not isinstance(row.get(key, ""), str | None):
                raise self._error("handlers", name, f"handler {name!r}: {key} is no text: {row[key]!r}")
        kind = row.get("()") or row.get("class")
        if row["formatter"] not in self.rows["formatters"]:
            raise self._error("handlers", name, f"handler {name!r}: no formatter is called {row['formatter']!r}")
        if kind == FILE_CLASS or kind in _FILE_CLASSES:
            return self._file(name, str(kind), row)
        if kind == "logging.StreamHandler":
            stream = _STREAMS.get(str(row.pop("stream", "stderr")))
            if stream is None:
                raise self._error("handlers", name, f"handler {name!r}: a stream is ext://sys.stdout or …stderr")
            del row["class"]
            return {**row, "()": CONSOLE_CLASS, "target": stream}
        self._check_class(name, kind)
        return row

    def _file(self, name: str, kind: str, row: dict[str, Any]) -> dict[str, Any]:
        row = {_FILE_KEYS.get(key, key): value for key, value in row.items() if key not in ("class", "()")}
        if "filename" not in row:
            raise self._error("handlers", name, f"handler {name!r} has no filename")
        if kind in _FILE_CLASSES:
            timed = kind.endswith("TimedRotatingFileHandler")
            row.setdefault("period", "h" if timed else "")
            row.setdefault("max_bytes", 0)
            row.setdefault("keep", 0)
            if kind.endswith(".RotatingFileHandler") and not row["keep"]:
                row["max_bytes"] = 0  # as there: without backups there is no rotation
        for key in ("max_bytes", "keep"):
            if not isinstance(row[key], int) or row[key] < 0:
                raise self._error("handlers", name, f"handler {name!r}: {key} is no whole number: {row[key]!r}")
        period = str(row["period"] or "")
        period = _PERIOD_OF_WHEN.get(re.sub(r"(?i)^w[0-6]$", "w", period).lower(), period)
        if period and period not in PERIODS:
            raise self._error("handlers", name, f"handler {name!r}: unknown period {period!r}: {', '.join(PERIODS)}")
        if row.get("interval", 1) != 1:
            self.notes.append(f"interval of handler {name!r}")
        if str(row.get("mode", "a")) != "a":
            self.notes.append(f"mode of handler {name!r} (files are appended to)")
        rest: dict[str, Any] = {key: row[key] for key in ("level", "filters") if key in row}
        options = {key: row[key] for key in ("max_bytes", "keep")}
        filename = Path(os.path.expanduser(row["filename"]))
        archive = row.get("archive") or ""
        return {**file_handler(filename, row["formatter"], period=period, archive=archive, **options), **rest}

    def _logger(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        section = "root" if name == "root" else "loggers"
        row = dict(row)
        if "level" in row:
            row["level"] = self._level(section, name, row["level"])
        handlers = row.get("handlers", [])
        if not isinstance(handlers, str | list):
            raise self._error(section, name, f"logger {name!r}: handlers is no list of names: {handlers!r}")
        for handler in [handlers] if isinstance(handlers, str) else handlers:
            if not isinstance(handler, str) or handler not in self.rows["handlers"]:
                raise self._error(section, name, f"logger {name!r}: no handler is called {handler!r}")
        return row

    def _check_class(self, name: str, kind: Any) -> None:
        try:
            logging.config.BaseConfigurator({}).resolve(str(kind))
        except (ValueError, ImportError) as error:
            reason = f"handler {name!r}: class {kind!r} cannot be imported ({error.__cause__ or error})"
            raise self._error("handlers", name, reason) from None

    def _level(self, section: str, name: str, level: Any) -> int:
        try:
            return level_number(level)
        except ValueError as error:
            raise self._error(section, name, f"{name!r}: {error}") from None

    def _substituted(self, name: str, value: Any) -> Any:
        """A value with its lookups replaced, where it is a text."""
        try:
            return substitute(value, {}, self._environ) if isinstance(value, str) else value
        except ValueError as error:
            raise self._error("handlers", name, f"{name!r}: {error}") from None

    def _error(self, section: str, name: str, reason: str) -> LogConfigError:
        return LogConfigError(self._path, self._line_of(section, name), reason)


def _read_yaml(path: Path, text: str) -> tuple[dict[str, Any], LineOf]:
    """YAML, of which JSON is a part; and at what line a row of a section stands."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        rows = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise LogConfigError(path, mark.line + 1 if mark else None, str(error.problem)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LogConfigError(path, None, f"not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(rows, dict):
        raise LogConfigError(path, 1, "no table of keys (version, handlers, loggers, …)")
    try:
        json.dumps(rows)
    except (TypeError, ValueError) as error:
        raise LogConfigError(path, None, f"{error}; put the value into quotes") from None
    lines: dict[tuple[str, str], int] = {}
    for section, row in getattr(node, "value", ()):
        lines[section.value, ""] = section.start_mark.line + 1
        if isinstance(row, yaml.MappingNode):
            for key, _ in row.value:
                lines[section.value, str(key.value)] = key.start_mark.line + 1
    return rows, lambda section, name: lines.get((section, name)) or lines.get((section, ""))


def _read_ini(path: Path, text: str) -> tuple[dict[str, Any], LineOf]:
    """Python's fileConfig format as the same tables."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text, str(path))
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or (getattr(error, "errors", None) or [(None,)])[0][0]
        raise LogConfigError(path, line, error.message.splitlines()[0]) from None
    titles = {"formatters": "formatter", "handlers": "handler", "loggers": "logger", "root": "logger"}

    def line_of(section: str, name: str) -> int | None:
        title = f"[{titles.get(section, section)}_{name or 'root'}]"
        lines = [line.strip() for line in text.splitlines()]
        return next((lines.index(each) + 1 for each in (title, f"[{section}]") if each in lines), None)

    def rows(section: str) -> dict[str, dict[str, str]]:
        names = [name.strip() for name in parser.get(section, "keys", fallback="").split(",") if name.strip()]
        title = titles[section]
        for name in names:
            if not parser.has_section(f"{title}_{name}"):
                raise LogConfigError(path, line_of(section, ""), f"there is no section [{title}_{name}]")
        return {name: dict(parser.items(f"{title}_{name}")) for name in names}

    result: dict[str, Any] = {"formatters": rows("formatters"), "handlers": {}, "loggers": {}}
    for name, row in rows("handlers").items():
        try:
            result["handlers"][name] = _ini_handler(row)
        except (ValueError, SyntaxError, TypeError) as error:
            reason = f"handler {name!r}: args and kwargs must be plain values that the class takes ({error})"
            raise LogConfigError(path, line_of("handlers", name), reason) from None
    for name, row in rows("loggers").items():
        found: dict[str, Any] = {"handlers": [each.strip() for each in row.get("handlers", "").split(",") if each]}
        if "level" in row:
            found["level"] = row["level"]
        if name == "root":
            result["root"] = found
        else:
            result["loggers"][row.get("qualname", name)] = {**found, "propagate": row.get("propagate", "1") != "0"}
    return result, line_of


def _ini_handler(row: dict[str, str]) -> dict[str, Any]:
    """A handler's section: its positional arguments become keys."""
    name = row.get("class", "")
    # As fileConfig: `StreamHandler` and `handlers.SysLogHandler` are of the logging package.
    in_logging = "." not in name or name.startswith("handlers.")
    kind = f"logging.{name}" if in_logging else name
    result: dict[str, Any] = {"class": kind} | {key: row[key] for key in ("level", "formatter") if row.get(key)}
    arguments = row.get("args", "()").replace("sys.stdout", "'stdout'").replace("sys.stderr", "'stderr'")
    values = ast.literal_eval(arguments)
    keywords = ast.literal_eval(row.get("kwargs", "{}"))
    maker = logging.config.BaseConfigurator({}).resolve(kind)
    bound = inspect.signature(maker).bind_partial(*values, **keywords)
    return result | bound.arguments
