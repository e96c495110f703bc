"""Archives from where a plugin fetches them, each in a process of its own: `python -m wsgi_ts.plugins.fetch`.

A plugin that hangs is killed with its process. `verify` of every such plugin is asked for every archive that was
fetched, whoever has fetched it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from wsgi_ts.plugins.found import Found, add_folders, found_in, import_object, made, said
from wsgi_ts.plugins.report import LOADED, PluginReport
from wsgi_ts.process import python_command
from wsgi_ts.settings.config import Config


class FetchFailed(OSError):
    """A plugin could not fetch an archive, or says that it is not to be used; the message is for the log."""


class Fetchers:
    """The plugins of the group `fetch`, for URLs of the `schemes`."""

    def __init__(self, config: Config, report: PluginReport) -> None:
        self._plugins_path = config.plugins_path
        self._report = report
        self._found = found_in(config.found_plugins, "fetch")
        self.schemes = frozenset(found.scheme.lower() for found in self._found if found.scheme)
        for found in self._found:
            report.note(found, LOADED)

    def open(self, url: str, target: Path, limit_s: float) -> None:
        """Has an archive written into a file.

        Raises:
            FetchFailed: that did not work.
        """
        scheme = url.partition("://")[0].lower()
        (found,) = [each for each in self._found if each.scheme.lower() == scheme]
        self._run(found, limit_s, action="open", url=url, path=str(target))

    def verify(self, url: str, path: Path, limit_s: float) -> None:
        """Asks whether an archive may be used.

        Raises:
            FetchFailed: it may not.
        """
        for found in self._found:
            self._run(found, limit_s, action="verify", url=url, path=str(path))

    def _run(self, found: Found, limit_s: float, **question: str) -> None:
        asked = {"plugins_path": self._plugins_path, "row": found.row(), **question}
        try:
            child = subprocess.run(
                python_command("wsgi_ts.plugins.fetch"),
                input=json.dumps(asked).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"{question['action']} took longer than {limit_s:g} s"
        else:
            if child.returncode == 0:
                return
            lines = child.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with {child.returncode}"
        self._report.failed(found, reason)
        raise FetchFailed(reason)


def _main() -> int:
    question: dict[str, Any] = json.load(sys.stdin)
    add_folders(question["plugins_path"])
    try:
        plugin = made(import_object(Found(**question["row"]).target))
        if question["action"] == "open":
            plugin.open(question["url"], question["path"])
        elif hasattr(plugin, "verify"):
            plugin.verify(question["path"], question["url"])
    except BaseException as error:  # sys.exit(0) in it is no success
        print(said(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
