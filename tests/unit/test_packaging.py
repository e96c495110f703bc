"""What is installed is what the tree holds."""

from __future__ import annotations

import configparser
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("wsgi_ts", "wsgi_ts/batcher", "wsgi_ts/gpu", "wsgi_ts/handlers", "model_archiver", "workflow_archiver")


def test_every_package_is_listed() -> None:
    """setup.cfg names them one by one; the folders under wsgi_ts/ that are links are searched by name."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = setup["options"]["packages"].split()
    there = {
        ".".join(file.parent.relative_to(REPOSITORY).parts)
        for folder in FOLDERS
        for file in (REPOSITORY / folder).rglob("__init__.py")
        if "ts_shim" not in file.parts
    }
    assert sorted(listed) == sorted(there)
