"""Renders charts that use of Helm's language only what ours do: values, the release's name, toYaml, nindent, and if."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_ACTION = re.compile(r"[ \t]*\{\{- (toYaml) (\.[\w.]+) \| nindent (\d+) \}\}|\{\{ (\.[\w.]+) \}\}")
_IF = re.compile(r"\{\{- if (\.[\w.]+) \}\}\n(.*?)\{\{- end \}\}\n", re.DOTALL)


def render(chart: Path, release: str, overrides: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The text of each template by its name, with the chart's own values.

    Args:
        chart: the chart's folder.
        release: the release's name.
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
    scope = {"Values": values, "Release": {"Name": release}}
    rendered = {}
    for template in sorted((chart / "templates").glob("*.yaml")):
        text = _IF.sub(lambda match: match[2] if _value(scope, match[1]) else "", template.read_text())
        text = _ACTION.sub(lambda match: _action(scope, match), text)
        assert "{{" not in text, f"{template.name}: {text[text.index('{{') :][:80]}"
        rendered[template.name] = text
    return rendered


def _value(scope: Mapping[str, Any], path: str) -> Any:
    for name in path.strip(".").split("."):
        scope = scope[name]
    return scope


def _action(scope: Mapping[str, Any], match: re.Match[str]) -> str:
    if match[1] is None:
        return str(_value(scope, match[4]))
    text = yaml.safe_dump(_value(scope, match[2]), default_flow_style=False).rstrip("\n")
    # In front of the first line is the line end that "{{-" has taken.
    return "\n".join(" " * int(match[3]) + line for line in text.splitlines())
