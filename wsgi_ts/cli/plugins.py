"""`wsgi-ts plugins` and `wsgi-ts plugin new`: which plugins there are, and the files of a new one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from wsgi_ts.cli.status import format_table
from wsgi_ts.instance.record import Record
from wsgi_ts.plugins.discovery import jars
from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.probe import JAR, examine
from wsgi_ts.plugins.report import plugin_rows
from wsgi_ts.plugins.scaffold import write_plugin
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.sources import CommandLine, load_config


def print_plugins(command_line: CommandLine, run_dir: Path, *, as_json: bool) -> int:
    """Prints the plugins of the instance that runs, else those that a server with this configuration would have.

    Returns the exit status: 1 if one of them cannot be used.

    Raises:
        ConfigError: the configuration makes no sense.
    """
    config = _running_config(run_dir)
    if config is not None:
        rows = plugin_rows(config.found_plugins, run_dir)
    else:
        # Where models lie is nothing to plugins.
        store = command_line.model_store or "."
        config = load_config(replace(command_line, model_store=store), os.environ)
        rows = [_row(found) for found in examine(config)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(_lines(rows)))
    for jar in jars(config.plugins_path):
        print(JAR.format(jar=jar), file=sys.stderr)
    return 1 if any(row["state"] == "failed" for row in rows) else 0


def new_plugin(group: str, name: str, folder: Path) -> int:
    """Writes the files of a new plugin, and says what to do next; the exit status is 1 where they are there already."""
    try:
        written = write_plugin(group, name, folder)
    except (FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(written))
    return 0


def _running_config(run_dir: Path) -> Config | None:
    record = Record.find(run_dir)
    file = RunFiles(run_dir).config
    if record is None or not record.is_running or not file.exists():
        return None
    return Config.from_json(file.read_text(encoding="utf-8"))


def _row(found: Found) -> dict[str, Any]:
    state = "failed" if found.error else "can be loaded"
    named = {"name": found.name, "version": found.version, "group": found.group, "from": found.origin}
    return {**named, "process": "", "state": state, "errors": 0, "error": found.error}


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "No plugins."
        return
    yield from format_table(rows)
