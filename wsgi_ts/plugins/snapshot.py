"""Snapshots in a store of a plugin's; where that fails, they are written to files as ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wsgi_ts.plugins.found import Found, made
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import within
from wsgi_ts.settings.config import Config

#: How long a store may take to keep a snapshot, in seconds.
LIMIT_S = 10.0


@dataclass
class Store:
    """A store, loaded when the first snapshot is kept."""

    config: Config
    found: Found
    report: PluginReport
    plugin: Any = None

    def keep(self, name: str, properties: Mapping[str, str]) -> bool:
        """Keeps a snapshot; returns whether it did."""

        def save() -> None:
            if self.plugin is None:
                for _, plugin in self.report.load(self.config, "snapshot"):
                    self.plugin = made(plugin)
            if self.plugin is None:
                raise RuntimeError("the store could not be loaded")
            self.plugin.save(name, dict(properties))

        try:
            within(LIMIT_S, save)
        except Exception as error:
            self.report.failed(self.found, error, instead="the snapshot is written to a file")
            return False
        return True
