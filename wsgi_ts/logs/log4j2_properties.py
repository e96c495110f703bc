"""A log4j2.properties as the elements of the log4j2.xml that says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path

from wsgi_ts.logs.log4j2 import Element
from wsgi_ts.logs.notation import LogConfigError
from wsgi_ts.quick_dataclass import dataclass

#: Name and value of a row; what stands between them is `=`, `:` or blanks.
_ROW = re.compile(r"((?:\\.|[^\\\s=:])+)(?:\s*[=:]\s*|\s+|$)(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
#: Lists of names that log4j does not need any more: it finds them in the rows.
_LISTS = frozenset(("appenders", "loggers", "filters", "packages"))


@dataclass(slots=True)
class _Node:
    """What stands under one part of the rows' names.

    Attributes:
        line: of the first row that has it.
        value: of the row that ends with it; None where there is none.
    """

    line: int
    value: str | None = None
    parts: dict[str, _Node] = field(default_factory=dict)

    def add(self, names: list[str], line: int) -> _Node:
        node = self
        for name in names:
            node = node.parts.setdefault(name, _Node(line))
        return node

    def values(self) -> dict[str, str]:
        """Names in lower case and values of the rows that end right under this."""
        return {name.lower(): node.value for name, node in self.parts.items() if node.value is not None}


def parse_properties(path: Path, text: str) -> Element:
    """The elements that the rows stand for.

    Raises:
        LogConfigError: they are those of log4j 1, or an appender or the like has no type.
    """
    top = _Node(1)
    properties = Element("properties", {}, 1)
    for line, name, value in _rows(text):
        section, _, rest = name.partition(".")
        if section == "log4j":
            raise LogConfigError(path, line, f"{name} is a key of log4j 1; write a log4j2.properties or a log4j2.xml")
        if section == "property":
            properties.children.append(Element("property", {"name": rest, "value": value}, line))
        else:
            top.add(name.split("."), line).value = value
    root = Element("configuration", {key: value for key, value in top.values().items() if key not in _LISTS}, 1)
    appenders, loggers = Element("appenders", {}, 1), Element("loggers", {}, 1)
    appenders.children = [_component(path, name, node) for name, node in _under(top, "appender")]
    loggers.children = [_logger(node, "logger") for _, node in _under(top, "logger")]
    if "rootLogger" in top.parts:
        loggers.children.append(_logger(top.parts["rootLogger"], "root"))
    root.children = [properties, appenders, loggers]
    root.children += [_component(path, name, node) for name, node in _under(top, "filter")]
    return root


def _rows(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, name and value of each row; a backslash at the end of a line joins it with the next one."""
    pending, began = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.lstrip()
        if not pending and (not line or line[0] in "#!"):
            continue
        began = began if pending else number
        pending += line
        if len(line) - len(line.rstrip("\\")) & 1:
            pending = pending[:-1]
            continue
        found = _ROW.match(pending)
        if found is not None:
            yield began, _unescaped(found[1]), _unescaped(found[2]).rstrip()
        pending = ""


def _unescaped(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code[1:], 16)) if len(code) > 1 else _CONTROLS.get(code, code)

    return _ESCAPE.sub(plain, text)


def _under(node: _Node, name: str) -> list[tuple[str, _Node]]:
    return list(node.parts[name].parts.items()) if name in node.parts else []


def _component(path: Path, name: str, node: _Node) -> Element:
    attributes = node.values()
    kind = attributes.pop("type", "")
    if not kind:
        raise LogConfigError(path, node.line, f"{name} has no type")
    element = Element(kind.lower(), attributes, node.line)
    for part, below in node.parts.items():
        if part == "appenderRef":
            element.children += _references(below)
        elif "type" in below.parts:
            element.children.append(_component(path, part, below))
        else:  # filters and the like have names of their own
            element.children += [_component(path, each, inner) for each, inner in below.parts.items()]
    return element


def _logger(node: _Node, kind: str) -> Element:
    """A logger; `level, appender, …` as its own value is the short form."""
    attributes = node.values()
    if attributes.pop("type", "").lower().startswith("async"):
        kind = f"async{kind}"
    level, *names = [part.strip() for part in (node.value or "").split(",")]
    if level:
        attributes.setdefault("level", level)
    element = Element(kind, attributes, node.line)
    element.children = [Element("appenderref", {"ref": name}, node.line) for name in names if name]
    element.children += [
        ref for part, below in node.parts.items() if part == "appenderRef" for ref in _references(below)
    ]
    return element


def _references(node: _Node) -> list[Element]:
    return [Element("appenderref", each.values(), each.line) for each in node.parts.values()]
