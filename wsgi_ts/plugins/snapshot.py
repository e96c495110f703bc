"""Snapshots in a store of a plugin's; where that fails, they are written to files as ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wsgi_ts.plugins.found import Found
from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.plugins.threads import within
from wsgi_ts.settings.config import Config

#: How long a store may take to keep a snapshot, in seconds.
LIMIT_S = 10.0
_INSTEAD = "the snapshot is written to a file"


@dataclass
class Store:
    """A store, loaded when the first snapshot is kept."""

    config: Config
    found: Found
    report: PluginReport
    plugin: Any = None

    def keep(self, name: str, properties: Mapping[str, str]) -> bool:
        """Keeps a snapshot; returns whether it did."""
        if self.plugin is None:
            for _, plugin in self.report.instances(self.config, "snapshot", _INSTEAD):
                self.plugin = plugin
        if self.plugin is None:
            return False
        try:
            within(LIMIT_S, lambda: self.plugin.save(name, dict(properties)))
        except Exception as error:
            self.report.failed(self.found, error, instead=_INSTEAD)
            return False
        return True
