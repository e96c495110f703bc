"""What a process says of its plugins: a file in the run directory, read for `/plugins`, `/metrics`, `wsgi-ts plugins`.

A failure costs the process that has it a count, and a line in the log, at most one a minute of those that are alike.
The file is written by a thread of its own: nobody waits for the disk, and nobody needs a lock of another process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from wsgi_ts.plugins.found import Found, add_folders, found_in, import_object, made, said
from wsgi_ts.plugins.threads import LOAD_LIMIT_S, Late, within
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config

log = logging.getLogger("wsgi_ts.plugins")

LOADED, FAILED, OFF = "loaded", "failed", "off"
_SAY_EVERY_S = 60.0
_MOST_SAID = 256
_WRITE_EVERY_S = 1.0

Result = TypeVar("Result")


class PluginReport:
    """The plugins of one process. Any thread may call.

    Args:
        alive: called after each plugin that was loaded, which may take up to `LOAD_LIMIT_S`.
    """

    def __init__(self, run_dir: Path, process: str, alive: Callable[[], None] = lambda: None) -> None:
        self._path = RunFiles(run_dir).plugins / f"{os.getpid()}.json"
        self._process = process
        self._alive = alive
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._said_at: dict[tuple[str, str], float] = {}
        self._hung: set[str] = set()
        self._is_due = self._is_closed = False

    def load(
        self, config: Config, group: str, wanted: Callable[[Found], bool] = lambda found: True
    ) -> Iterator[tuple[Found, Any]]:
        """Imports the plugins of a group that are wanted here; those that fail are told, and left out."""
        rows = [found for found in found_in(config.found_plugins, group) if wanted(found)]
        if rows:
            add_folders(config.plugins_path)
        for found in rows:
            plugin = self.begun(found, partial(import_object, found.target), "it is left out")
            if plugin is not None:
                self.note(found, LOADED)
                yield found, plugin

    def instances(self, config: Config, group: str, instead: str = "it is left out") -> Iterator[tuple[Found, Any]]:
        """As `load`, with an instance of each class; one that cannot be made is told and left out like the others."""
        for found, plugin in self.load(config, group):
            instance = self.begun(found, partial(made, plugin), instead)
            if instance is not None:
                yield found, instance

    def begun(self, found: Found, call: Callable[[], Result], instead: str) -> Result | None:
        """What a call returns with which a plugin begins here; None where it fails or hangs, which is told.

        Of one that has hung nothing is begun any more in this process: it would take as long again.
        """
        if found.target in self._hung:
            return None
        try:
            return within(LOAD_LIMIT_S, call)
        except Exception as error:
            if isinstance(error, TimeoutError):
                self._hung.add(found.target)
            self.failed(found, error, state=FAILED, instead=instead)
            return None
        finally:
            self._alive()

    def note(self, found: Found, state: str) -> None:
        """Notes what has become of a plugin here."""
        with self._lock:
            row = self._rows.setdefault(found.name, _new_row(found))
            row |= {"state": state, "error": ""}
        self._write_soon()

    def note_earlier(self, found: Found) -> None:
        """Counts what has failed before this process began, of which a line was written already."""
        with self._lock:
            row = self._rows.setdefault(found.name, _new_row(found))
            row |= {"errors": row["errors"] + 1, "error": found.error or found.problem}
            row["state"] = FAILED if found.error else row["state"]
        self._write_soon()

    def failed(self, found: Found, error: BaseException | str, *, state: str = "", instead: str = "") -> None:
        """Counts a failure, and logs it with what is done `instead`. An empty `state`: the plugin goes on.

        Not what ends a call that was given up: who gives it up has counted that.
        """
        if isinstance(error, Late):
            return
        text = error if isinstance(error, str) else said(error)
        now = time.monotonic()
        with self._lock:
            row = self._rows.setdefault(found.name, _new_row(found))
            row["errors"] += 1
            row["error"] = text
            row["state"] = state or row["state"]
            is_news = bool(state) or now >= self._said_at.get((found.name, text), 0.0)
            if is_news:
                if len(self._said_at) >= _MOST_SAID:
                    self._said_at.clear()
                self._said_at[found.name, text] = now + _SAY_EVERY_S
        if is_news:
            trace = error if isinstance(error, BaseException) else None
            log.error("Plugin %s: %s%s", found.name, text, f"; {instead}" if instead else "", exc_info=trace)
        # Where one plugin was bad enough to be left out, another may soon end the process.
        self._write_soon(at_once=bool(state))

    def dropped(self, found: Found) -> None:
        """Counts an event that a plugin was not told of, since too many were waiting."""
        with self._lock:
            row = self._rows.setdefault(found.name, _new_row(found))
            row["dropped"] = row.get("dropped", 0) + 1
        self._write_soon()

    def close(self) -> None:
        """Writes nothing more: the run directory is about to go."""
        with self._lock:
            self._is_due = self._is_closed = True

    def _write_soon(self, *, at_once: bool = False) -> None:
        with self._lock:
            if self._is_due and not at_once:
                return
            self._is_due = True
        timer = threading.Timer(0.0 if at_once or not self._path.exists() else _WRITE_EVERY_S, self._write)
        timer.daemon = True
        timer.start()

    def _write(self) -> None:
        with self._writing:
            with self._lock:
                if self._is_closed:
                    return
                self._is_due = False
                text = json.dumps({"process": self._process, "pid": os.getpid(), "plugins": self._rows})
            temporary = self._path.with_suffix(".new")
            # The directory goes with the instance, perhaps before this process does.
            with contextlib.suppress(OSError):
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self._path)


def _new_row(found: Found) -> dict[str, Any]:
    return {"group": found.group, "from": found.origin, "errors": 0, "state": LOADED, "error": ""}


def read_reports(run_dir: Path) -> list[dict[str, Any]]:
    """What the processes of an instance have said, those of dead ones included."""
    reports = []
    for path in sorted(RunFiles(run_dir).plugins.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            reports.append(json.loads(path.read_text(encoding="utf-8")))
    return reports


def plugin_rows(config_rows: Iterable[Mapping[str, Any]], run_dir: Path) -> list[dict[str, Any]]:
    """The plugins of an instance, a row for each kind of process that has one."""
    reports = read_reports(run_dir)
    rows = []
    for found in (Found(**row) for row in config_rows):
        base = {"name": found.name, "version": found.version, "group": found.group, "from": found.origin}
        by_process: dict[str, dict[str, Any]] = {}
        for report in reports:
            here = report["plugins"].get(found.name)
            if here is None:
                continue
            row = by_process.setdefault(report["process"], {"state": LOADED, "errors": 0, "error": ""})
            row["errors"] += here["errors"]
            if not Path(f"/proc/{report['pid']}").exists():
                continue  # what has become of it there is of no interest any more
            row["error"] = here["error"] or row["error"]
            row["state"] = row["state"] if here["state"] == LOADED else here["state"]
        if not by_process:
            by_process[""] = {"state": FAILED if found.error else "not loaded", "errors": 0, "error": found.error}
        rows += [{**base, "process": process, **row} for process, row in sorted(by_process.items())]
    known = {row["name"] for row in rows}
    for report in reports:
        for name, here in report["plugins"].items():
            if name not in known:
                base = {"name": name, "version": "", "group": here["group"], "from": here["from"]}
                values = {key: here[key] for key in ("state", "errors", "error")}
                rows.append({**base, "process": report["process"], **values})
    return rows


def counts(run_dir: Path, what: str) -> dict[str, int]:
    """A count of each plugin, in all processes together: `errors`, or `dropped` where there are any."""
    found: Counter[str] = Counter()
    for report in read_reports(run_dir):
        for name, row in report["plugins"].items():
            if what in row:
                found[name] += row[what]
    return dict(found)
