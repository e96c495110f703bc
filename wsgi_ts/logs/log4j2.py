"""A log4j2.xml as a plan: its levels, files, rotation and patterns, as far as they have a counterpart here.

Names of Java's own loggers (io.netty, org.apache …) are taken over and reach nobody. What does not translate is named
in one note; what makes no sense is an error with its line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from wsgi_ts.logs.notation import LogConfigError, level_number, substitute, with_our_names
from wsgi_ts.logs.plan import CONSOLE_CLASS, file_handler, line_format
from wsgi_ts.quick_dataclass import dataclass

_ROLLING = ("rollingfile", "rollingrandomaccessfile")
_FILES = ("file", "randomaccessfile", "memorymappedfile")
#: Java's letters for a date, and strftime's codes.
_DATE_CODES = {
    **{"yyyy": "%Y", "uuuu": "%Y", "y": "%Y", "yy": "%y", "MMMM": "%B", "MMM": "%b", "MM": "%m", "M": "%m"},
    **{"dd": "%d", "d": "%d", "DDD": "%j", "D": "%j", "EEEE": "%A", "EEE": "%a", "E": "%a", "HH": "%H", "H": "%H"},
    **{"hh": "%I", "h": "%I", "a": "%p", "mm": "%M", "m": "%M", "ss": "%S", "s": "%S", "SSS": "{ms}"},
    **{"Z": "%z", "z": "%Z", "XXX": "%z", "X": "%z", "w": "%V", "ww": "%V", "YYYY": "%G"},
}
_NAMED_DATES = {
    "ISO8601": "yyyy-MM-dd'T'HH:mm:ss,SSS",
    "ISO8601_BASIC": "yyyyMMdd'T'HHmmss,SSS",
    "DEFAULT": "yyyy-MM-dd HH:mm:ss,SSS",
    "ABSOLUTE": "HH:mm:ss,SSS",
    "COMPACT": "yyyyMMddHHmmssSSS",
    "DATE": "dd MMM yyyy HH:mm:ss,SSS",
}
#: The period of a rotation is the finest unit in its file's pattern.
_PERIOD_CODES = (("second", "%S"), ("minute", "%M"), ("hour", "%H"), ("day", "%d"), ("day", "%j"), ("week", "%V"))
_DATE_PART = re.compile(r"'(?:[^']|'')*'|([A-Za-z])\1*|[^A-Za-z']+")
#: Conversion words of a PatternLayout, longest first.
_WORDS = {
    **dict.fromkeys(("level", "p"), "levelname"),
    **dict.fromkeys(("thread", "tn", "t"), "threadName"),
    **dict.fromkeys(("logger", "c"), "name"),
    **dict.fromkeys(("message", "msg", "m"), "message"),
    **dict.fromkeys(("processId", "pid"), "process"),
}
#: TorchServe's own layouts, in lower case, and the formatters that stand for them.
_METRIC_LAYOUTS = {
    "jsonpatternlayout": "wsgi_ts.logs.metric_layouts.JsonLayout",
    "qloglayout": "wsgi_ts.logs.metric_layouts.QlogLayout",
}
#: What the end of a line and a traceback have anyway.
_IMPLIED = ("n", "xEx", "ex", "throwable", "xThrowable", "xwEx", "rEx")
_CONVERSION = re.compile(r"%(?:(%)|(-?\d*(?:\.-?\d+)?)([A-Za-z]+)((?:\{[^{}]*\})*))")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


@dataclass(slots=True)
class Element:
    """One element: its name in lower case, its attributes likewise, where it began, and what is in it."""

    name: str
    attributes: dict[str, str]
    line: int
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *names: str) -> list[Element]:
        """The children with one of these names."""
        return [child for child in self.children if child.name in names]

    def get(self, name: str) -> str:
        """An attribute, or the text of a child of that name; empty where there is neither."""
        found = self.attributes.get(name.lower())
        if found is None:
            found = next((child.text.strip() or child.get("value") for child in self.all(name.lower())), "")
        return found


def translate(path: Path, root: Element, environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A log4j2.xml as the rows of a plan, and what of it does not translate; `environ` is for `${env:NAME}`.

    Raises:
        LogConfigError: it cannot be used.
    """
    if root.name != "configuration":
        raise LogConfigError(path, root.line, f"the outermost element is <{root.name}>, not <Configuration>")
    return _Translation(path, environ).carry_out(root)


def parse(path: Path, text: str) -> Element:
    """The elements of an XML text without DOCTYPE: with no entities but XML's own there is nothing to load or blow up.

    Raises:
        LogConfigError: not such a text.
    """
    # The text is decoded already: the encoding that its first line declares was that of the file.
    parser = expat.ParserCreate("utf-8")
    top = Element("", {}, 0)
    stack = [top]

    def start(name: str, attributes: dict[str, str]) -> None:
        rows = {key.lower(): value for key, value in attributes.items()}
        element = Element(name.rpartition(":")[2].lower(), rows, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def characters(data: str) -> None:
        stack[-1].text += data

    def doctype(*_: object) -> None:
        raise LogConfigError(path, parser.CurrentLineNumber, "DOCTYPE and entities are refused; remove them")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = characters
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise LogConfigError(path, error.lineno, expat.ErrorString(error.code)) from None
    return top.children[0]


class _Translation:
    """The walk through one file."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self._path = path
        self._environ = environ
        self._properties: dict[str, str] = {}
        self._formatters: dict[str, Any] = {}
        self._handlers: dict[str, dict[str, Any]] = {}
        #: What an appender stands for: itself, none (left out), or those behind an Async.
        self._appenders: dict[str, list[str]] = {}
        self._left_out: dict[str, int] = {}

    def carry_out(self, configuration: Element) -> tuple[dict[str, Any], list[str]]:
        for section in configuration.all("properties"):
            for row in section.all("property"):
                self._properties[row.get("name")] = row.attributes.get("value", row.text.strip())
        for child in configuration.children:
            if child.name not in ("properties", "appenders", "loggers"):
                self._leave_out(f"<{child.name}>", child)
        for section in configuration.all("appenders"):
            # An Async appender names others, which may come behind it.
            for appender in sorted(section.children, key=lambda each: each.name == "async"):
                self._appender(appender)
        rows: dict[str, Any] = {"root": {"level": "ERROR", "handlers": []}, "loggers": {}}
        for section in configuration.all("loggers"):
            for logger in section.children:
                if logger.name in ("root", "asyncroot"):
                    rows["root"] = self._logger(logger, "ERROR")
                elif logger.name in ("logger", "asynclogger"):
                    additive = self._attribute(logger, "additivity", "true").lower() != "false"
                    name = self._attribute(logger, "name")
                    rows["loggers"][name] = {**self._logger(logger, None), "propagate": additive}
                else:
                    self._leave_out(f"<{logger.name}>", logger)
        rows["loggers"] = with_our_names(rows["loggers"])
        rows |= {"version": 1, "disable_existing_loggers": False}
        rows |= {"formatters": self._formatters, "handlers": self._handlers}
        notes = [f"{what} (line {line})" for what, line in self._left_out.items()]
        return rows, notes

    def _appender(self, element: Element) -> None:
        name = self._attribute(element, "name")
        if not name:
            raise self._error(element, f"<{element.name}> has no name")
        if element.name == "async":
            refs = [self._attribute(each, "ref") for each in element.all("appenderref", "appender-ref")]
            self._appenders[name] = [target for ref in refs for target in self._resolve(element, ref)]
            return
        if element.name == "null":
            self._appenders[name] = []
            return
        if element.name == "console":
            target = self._attribute(element, "target", "SYSTEM_OUT")
            stream = "stderr" if target == "SYSTEM_ERR" else "stdout"
            row: dict[str, Any] = {"()": CONSOLE_CLASS, "target": stream, "formatter": self._layout(element, name)}
        elif element.name in _ROLLING + _FILES:
            row = self._file(element, name)
        else:
            self._leave_out(f"<{element.name}> appender {name!r}", element)
            self._appenders[name] = []
            return
        for child in element.all("thresholdfilter", "filters"):
            for threshold in [child, *child.all("thresholdfilter")]:
                if threshold.name == "thresholdfilter":
                    level = self._level(threshold, self._attribute(threshold, "level", "ERROR"))
                    row["level"] = logging.ERROR if level is None else level
        self._note_children(element)
        self._handlers[name] = row
        self._appenders[name] = [name]

    def _file(self, element: Element, name: str) -> dict[str, Any]:
        filename = self._attribute(element, "fileName")
        if not filename:
            raise self._error(element, f"appender {name!r} has no fileName")
        if element.name in _FILES:
            return file_handler(filename, self._layout(element, name), max_bytes=0, period="", keep=0)
        pattern = self._attribute(element, "filePattern")
        archive = self._archive(element, pattern) if pattern else ""
        options: dict[str, Any] = {"max_bytes": 0, "period": "", "keep": 7}
        policies = [each for box in element.all("policies") for each in box.children] or element.children
        for policy in policies:
            if policy.name == "sizebasedtriggeringpolicy":
                options["max_bytes"] = self._size(policy)
            elif policy.name == "timebasedtriggeringpolicy":
                options["period"] = next((period for period, code in _PERIOD_CODES if code in archive), "month")
                if self._attribute(policy, "interval", "1") != "1":
                    self._leave_out("interval", policy)
            elif policy.name.endswith("policy"):
                self._leave_out(f"<{policy.name}>", policy)
        for strategy in element.all("defaultrolloverstrategy"):
            most = self._attribute(strategy, "max", "7")
            if not most.isdigit():
                raise self._error(strategy, f"max={most!r} is no whole number")
            options["keep"] = int(most)
            for child in strategy.children:
                self._leave_out(f"<{child.name}>", child)
        if archive and not Path(archive).is_absolute():
            archive = str(Path.cwd()).replace("%", "%%") + "/" + archive
        return file_handler(filename, self._layout(element, name), archive=archive, **options)

    def _note_children(self, element: Element) -> None:
        """Notes the parts of an appender that mean nothing here."""
        known = {"patternlayout", "policies", "defaultrolloverstrategy", "thresholdfilter", "filters"}
        known |= {"filename", "filepattern", "sizebasedtriggeringpolicy", "timebasedtriggeringpolicy"}
        for child in element.children:
            if child.name not in known and not child.name.endswith(("layout", "policy")):
                self._leave_out(f"<{child.name}>", child)

    def _archive(self, element: Element, pattern: str) -> str:
        """A filePattern as `Rotation.archive`."""

        def date(match: re.Match[str]) -> str:
            return self._date(element, match[1]).replace("{ms}", "")

        parts = re.split(r"(%d\{[^{}]*\}(?:\{[^{}]*\})?|%d|%\d*i)", pattern)
        text = ""
        for part in parts:
            if part.startswith("%d"):
                text += re.sub(r"%d\{([^{}]*)\}.*", date, part) if part != "%d" else "%Y-%m-%d"
            else:
                text += "%i" if re.fullmatch(r"%\d*i", part) else part.replace("%", "%%")
        for ending in (".zip", ".bz2", ".xz", ".zst"):
            if text.endswith(ending):
                self._leave_out(f"{ending} (.gz instead)", element)
                return text.removesuffix(ending) + ".gz"
        return text

    def _layout(self, element: Element, name: str) -> str:
        """Makes the formatter of an appender, and returns its name."""
        layouts = [child for child in element.children if child.name.endswith("layout")]
        pattern, at = "%m%n", element
        for layout in layouts:
            at = layout
            if layout.name in _METRIC_LAYOUTS:
                self._formatters[name] = {"()": _METRIC_LAYOUTS[layout.name]}
                return name
            if layout.name == "patternlayout":
                pattern = self._attribute(layout, "pattern") or "%m%n"
            else:
                self._leave_out(f"<{layout.name}>", layout)
                pattern = "%d{ISO8601} [%-5p] %t %c - %m%n"
        text, datefmt = self._pattern(at, pattern)
        self._formatters[name] = line_format(text, datefmt)
        return name

    def _pattern(self, element: Element, pattern: str) -> tuple[str, str | None]:
        """A pattern as a %-format of ours and the format of its date."""
        datefmt: list[str] = []
        words = sorted([*_WORDS, *_IMPLIED, "date", "d"], key=len, reverse=True)

        def convert(match: re.Match[str]) -> str:
            if match[1]:
                return "%%"
            width, letters, options = match[2], match[3], match[4]
            word = next((each for each in words if letters.startswith(each)), None)
            rest = letters.removeprefix(word) if word else ""
            if word is None:
                self._leave_out(f"%{letters}", element)
                return ""
            if word in _IMPLIED:
                return rest
            if word in ("d", "date"):
                given = re.findall(r"\{([^{}]*)\}", options)
                code = self._date(element, given[0] if given else "DEFAULT")
                if len(given) > 1:
                    self._leave_out(f"time zone {given[1]}", element)
                if datefmt and datefmt[0] != code:
                    self._leave_out("a second date format", element)
                datefmt.append(code)
                return f"%(asctime){width}s{rest}"
            name = _WORDS[word]
            if options and name == "name":
                name = "short_name" if options == "{1}" else name
                if name != "short_name":
                    self._leave_out(f"%{word}{options}", element)
            return f"%({name}){width.replace('.-', '.')}s{rest}"

        pieces, end = [], 0
        for match in _CONVERSION.finditer(pattern):
            pieces += [pattern[end : match.start()].replace("%", "%%"), convert(match)]
            end = match.end()
        text = "".join([*pieces, pattern[end:].replace("%", "%%")])
        return text.rstrip("\n"), datefmt[0] if datefmt else None

    def _date(self, element: Element, java: str) -> str:
        """A Java date pattern as strftime's, with `{ms}` for milliseconds."""
        result = ""
        for match in _DATE_PART.finditer(_NAMED_DATES.get(java, java)):
            part = match[0]
            if part.startswith("'"):
                result += part[1:-1].replace("''", "'").replace("%", "%%") or "'"
            elif match[1]:
                code = _DATE_CODES.get(part)
                if code is None:
                    self._leave_out(f"%d letter {part}", element)
                result += code or ""
            else:
                result += part.replace("%", "%%")
        return result

    def _size(self, policy: Element) -> int:
        text = self._attribute(policy, "size", "10 MB")
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise self._error(policy, f"size={text!r} is no size; write it like 100 MB")
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))

    def _logger(self, element: Element, default_level: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        level = self._attribute(element, "level", default_level or "")
        number = self._level(element, level) if level else None
        if number is None and default_level is not None:
            number = level_number(default_level)
        if number is not None:
            row["level"] = number
        handlers: list[str] = []
        for reference in element.all("appenderref", "appender-ref"):
            targets = self._resolve(reference, self._attribute(reference, "ref"))
            limit = self._attribute(reference, "level")
            lowest = self._level(reference, limit) if limit else None
            if lowest is not None:
                targets = [self._limited(each, lowest) for each in targets]
            handlers += targets
        return {**row, "handlers": handlers}

    def _limited(self, name: str, level: int) -> str:
        """An appender as one logger sees it, which lets only some levels through."""
        limited = f"{name} from {level}"
        base = self._handlers[name]
        self._handlers[limited] = {**base, "level": max(level, base.get("level", 0))}
        return limited

    def _resolve(self, element: Element, reference: str) -> list[str]:
        if reference not in self._appenders:
            raise self._error(element, f"no appender is called {reference!r}")
        return self._appenders[reference]

    def _level(self, element: Element, level: str) -> int | None:
        """A level's number; None, as for log4j, where there is no such level."""
        try:
            return level_number(level)
        except ValueError as error:
            self._leave_out(str(error), element)
            return None

    def _attribute(self, element: Element, name: str, default: str = "") -> str:
        """An attribute with its lookups replaced."""
        try:
            return substitute(element.get(name), self._properties, self._environ) or default
        except ValueError as error:
            raise self._error(element, f"{name}: {error}") from None

    def _leave_out(self, what: str, element: Element) -> None:
        self._left_out.setdefault(what, element.line)

    def _error(self, element: Element, reason: str) -> LogConfigError:
        return LogConfigError(self._path, element.line, reason)
