"""`python -m wsgi_ts.cli.config_reference docs/configuration.md`: puts the tables of all keys into that page.

Each table follows a comment that names it: `config.properties from KEY` (up to the key that the next such table begins
with), `model-config.yaml` or `torchrun`. A test holds the page against the tables in the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wsgi_ts.models.model_yaml import ModelYaml, TorchrunOptions
from wsgi_ts.settings.config import property_settings
from wsgi_ts.settings.table import Setting, settings_of

#: Defaults that are not the same on every machine.
_DEFAULTS = {"python": "the server's own"}
_TABLE = re.compile(r"(<!-- (config\.properties|model-config\.yaml|torchrun)(?: from (\w+))? -->\n\n)(?:\|.*\n)*")


def with_tables(page: str) -> str:
    """The page with the tables as the code has them now."""
    properties = property_settings()
    names = list(properties)
    begins = [names.index(key) for _, _, key in _TABLE.findall(page) if key]
    ends = dict(zip(begins, [*begins[1:], len(names)], strict=True))

    def table(match: re.Match[str]) -> str:
        comment, which, first = match.groups()
        if which == "config.properties":
            start = names.index(first)
            rows = [_property_row(name, properties[name]) for name in names[start : ends[start]]]
            return comment + _table(("key", "value", "default", "variable", "meaning"), rows)
        yaml = ModelYaml if which == "model-config.yaml" else TorchrunOptions
        rows = [
            (f"`{row.key}`", row.kind.name, _shown(row.default), _meaning(row)) for row in settings_of(yaml).values()
        ]
        return comment + _table(("key", "value", "default", "meaning"), rows)

    return _TABLE.sub(table, page)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (columns, *rows)]
    head, *body = [f"| {line} |\n" for line in lines]
    return "".join([head, f"|{'---|' * len(columns)}\n", *body])


def _property_row(name: str, row: Setting) -> tuple[str, ...]:
    variable = row.variable(name)
    default = _DEFAULTS.get(name) or _shown(row.default)
    return f"`{name}`", row.kind.name, default, f"`{variable}`" if variable else "", _meaning(row)


def _meaning(row: Setting) -> str:
    return f"{'' if row.has_effect else '**no effect here**: '}{row.help}{' (*ours*)' if row.ours else ''}"


def _shown(value: Any) -> str:
    """A default as one writes it; empty for none."""
    if value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int | Path) else f"`{value}`"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
