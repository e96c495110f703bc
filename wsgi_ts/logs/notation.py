"""Words that log4j2.xml and Python's log configurations have in common: levels, `${…}`, names of loggers."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.logs.plan import LEVEL_ALL, LEVEL_OFF, OUR_LOGGERS

_LEVELS = {
    **{"ALL": LEVEL_ALL, "TRACE": 5, "DEBUG": 10, "INFO": 20, "WARN": 30, "WARNING": 30},
    **{"ERROR": 40, "FATAL": 50, "CRITICAL": 50, "OFF": LEVEL_OFF, "NOTSET": 0},
}
_LOOKUP = re.compile(r"\$\{([^${}]*)\}")


class LogConfigError(Exception):
    """A log configuration cannot be used; the message says where, what and what to do, on one line."""

    def __init__(self, path: Path | str, line: int | None, reason: str) -> None:
        where = f"{path}:{line}" if line else str(path)
        super().__init__(f"{where}: {reason}")


def substitute(text: str, properties: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Replaces log4j's lookups: `${name}`, `${env:NAME}`, `${hostName}`, each with `:-default` or without.

    Raises:
        ValueError: one has neither value nor default.
    """

    def value(match: re.Match[str]) -> str:
        name, has_default, default = match[1].partition(":-")
        found: str | None
        if name.startswith("env:"):
            found = environ.get(name[4:])
        elif name.lower() == "hostname":
            found = socket.gethostname()
        else:
            found = properties.get(name)
        if found is None and not has_default:
            raise ValueError(f"${{{name}}} has no value; set it, or give a default: ${{{name}:-…}}")
        return default if found is None else found

    for _ in range(20):
        replaced = _LOOKUP.sub(value, text)
        if replaced == text:
            return text
        text = replaced
    raise ValueError("its ${…} refer to each other without end")


def level_number(level: Any) -> int:
    """A level's number, by its name in log4j or Python; raises ValueError where there is none."""
    if isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    # YAML takes a bare OFF for the boolean.
    number = LEVEL_OFF if level is False else _LEVELS.get(str(level).strip().upper())
    if number is None:
        raise ValueError(f"unknown level {level!r}; use one of {', '.join(_LEVELS)}")
    return number


def with_our_names(loggers: dict[str, Any]) -> dict[str, Any]:
    """Lets what is said of one of our loggers' names count for the other as well."""
    for name, other in (OUR_LOGGERS, OUR_LOGGERS[::-1]):
        if name in loggers and other not in loggers:
            loggers[other] = copy.deepcopy(loggers[name])
    return loggers
