"""`wsgi-ts status`: what the supervisor of a running instance says of it, for people or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from wsgi_ts.control.client import ControlPlane, NotReachable
from wsgi_ts.errors import ServerError
from wsgi_ts.instance.record import Record

#: Exit status where nothing runs, as init scripts have it.
EXIT_NOT_RUNNING = 3
ANSWER_LIMIT_S = 10.0


def print_status(run_dir: Path, *, as_json: bool) -> int:
    """Prints the state of an instance; returns the exit status.

    That is 0, 3 if nothing runs there, 1 if the supervisor refused or does not run at the moment.
    """
    try:
        with closing(ControlPlane(run_dir)) as supervisor:
            state = supervisor.call("status", timeout_s=ANSWER_LIMIT_S)
    except NotReachable:
        record = Record.find(run_dir)
        if record is not None and record.is_running:
            print(
                f"Process {record.pid} starts the server, or is about to do it again; ask in a moment.", file=sys.stderr
            )
            return 1
        print(f"Not running: nothing answers in {run_dir}.", file=sys.stderr)
        return EXIT_NOT_RUNNING
    except ServerError as error:
        print(f"{error.type_name}: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps(state, indent=2) if as_json else "\n".join(format_state(state)))
    return 0


def format_state(state: Mapping[str, Any]) -> Iterator[str]:
    """The lines for people: plain values first, then every list of objects as a table under its name."""
    plain = [(key, value) for key, value in state.items() if not _is_table(value)]
    width = max((len(key) for key, _ in plain), default=0)
    for key, value in plain:
        yield f"{key.replace('_', ' '):<{width}}  {_cell(value)}"
    for key, value in state.items():
        if _is_table(value):
            yield ""
            yield key.replace("_", " ")
            yield from format_table(_rows(value))


def format_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as aligned columns; the columns are the keys of all rows, in the order of their appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[column.replace("_", " ") for column in columns]]
    cells += [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _is_table(value: Any) -> bool:
    items = list(value.values()) if isinstance(value, dict) else value
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) for item in items)


def _rows(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, dict):
        return [{"name": name, **fields} for name, fields in value.items()]
    return list(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(item)}" for key, item in value.items()) or "-"
    return str(value)
