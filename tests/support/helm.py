"""Renders charts that use of Helm's language only what ours do: values, the release, `if`, `with`, some functions."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

#: An action; "-" beside a brace takes the blanks and line ends on that side away.
_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)


def render(chart: Path, release: str, overrides: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The text of each template by its name, with the chart's own values.

    Args:
        chart: the chart's folder.
        release: the release's name; its namespace is `default`.
        overrides: for values by their dotted path.
    """
    values = yaml.safe_load((chart / "values.yaml").read_text())
    for path, value in (overrides or {}).items():
        *folders, last = path.split(".")
        place = values
        for folder in folders:
            place = place[folder]
        assert last in place, path
        place[last] = value
    scope = {"Values": values, "Release": {"Name": release, "Namespace": "default"}}
    rendered = {}
    for template in sorted((chart / "templates").glob("*.yaml")):
        parts = _parts(template.read_text())
        rendered[template.name] = "".join(_block(parts, scope, scope))
        assert next(parts, None) is None, f"{template.name}: an end too many"
    return rendered


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """Text and actions in turn, text without what the actions beside it take away."""
    pieces = _ACTION.split(text)
    takes_behind = ""
    for index in range(0, len(pieces), 4):
        plain = pieces[index].lstrip() if takes_behind else pieces[index]
        takes_before, action, behind = pieces[index + 1 : index + 4] if index + 1 < len(pieces) else ("", "", "")
        yield False, plain.rstrip() if takes_before else plain
        if action:
            yield True, action
        takes_behind = behind


def _block(parts: Iterator[tuple[bool, str]], root: Mapping[str, Any], dot: Any) -> list[str]:
    """What stands there up to the end of the block, or of the template."""
    made = []
    for is_action, text in parts:
        word, _, rest = text.partition(" ")
        if not is_action:
            made.append(text)
        elif text == "end":
            break
        elif word in ("if", "with"):
            value = _pipeline(rest, root, dot)
            inner = _block(parts, root, value if word == "with" else dot)
            made += inner if value else []
        else:
            made.append(str(_pipeline(text, root, dot)))
    return made


def _pipeline(text: str, root: Mapping[str, Any], dot: Any) -> Any:
    """The value of commands, each of which has that of the one before it as its last argument."""
    last: list[Any] = []
    for command in text.split(" | "):
        name, *words = shlex.split(command, posix=False)
        arguments = [_operand(word, root, dot) for word in words] + last
        last = [_FUNCTIONS[name](*arguments) if name in _FUNCTIONS else _operand(name, root, dot)]
    return last[0]


def _operand(word: str, root: Mapping[str, Any], dot: Any) -> Any:
    if not word.startswith((".", "$")):
        return json.loads(word)
    value: Any = root if word.startswith("$") else dot
    for name in word.lstrip("$").split("."):
        value = value[name] if name else value
    return value


def _to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=False).removesuffix("\n")


def _indented(spaces: int, text: str) -> str:
    return "".join(f"\n{' ' * spaces}{line}" for line in text.split("\n"))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "toYaml": _to_yaml,
    "nindent": _indented,
    "quote": lambda value: json.dumps(str(value)),
    "not": lambda value: not value,
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
}
