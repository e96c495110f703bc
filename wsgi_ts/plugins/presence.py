"""Whether a configuration has plugins at all, told before anything is imported that only they need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from wsgi_ts.settings.config import Config

#: Groups of entry points that are ours start so.
PREFIX = "wsgi_ts."
#: What an installed distribution leaves beside its packages.
_RECORDS = (".dist-info", ".egg-info")


def has_plugins(config: Config) -> bool:
    """Whether there is anything to look at; costs a few milliseconds."""
    return bool(config.plugins_path or config.plugin or config.middleware) or entry_points_exist()


def entry_points_exist() -> bool:
    """Whether anything that is installed names a plugin; imports none of them.

    `importlib.metadata` takes ten times as long, and is asked about what lies in no folder.
    """
    if any(os.path.isfile(each) for each in sys.path):
        from importlib import metadata

        return any(group.startswith(PREFIX) for group in metadata.entry_points().groups)
    header = f"[{PREFIX}".encode()
    return any(header in text for folder in sys.path for text in _entry_point_files(folder or os.curdir))


def _entry_point_files(folder: str) -> Iterator[bytes]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if name.endswith(_RECORDS):
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb", buffering=0) as file:
                    yield file.read()
            except OSError:
                continue
