"""Whether plugins are installed is told without importing what only plugins need."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from wsgi_ts.plugins.presence import has_plugins
from wsgi_ts.settings.config import Config

ENTRY = "[console_scripts]\nx = x:x\n\n[wsgi_ts.endpoints]\nhello = hello:answer\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of `sys.path`, beside one that is missing."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "missing")])
    return tmp_path


def installed(folder: Path, name: str, entry_points: str | None) -> None:
    (folder / name).mkdir()
    (folder / name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.partition('-')[0]}\nVersion: 1\n")
    if entry_points is not None:
        (folder / name / "entry_points.txt").write_text(entry_points)


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])
def test_an_installed_plugin_is_found(folder: Path, kind: str) -> None:
    installed(folder, f"other-1.{kind}", "[console_scripts]\nwsgi_ts.x = x:x\n")
    installed(folder, f"plain-1.{kind}", None)
    assert not has_plugins(Config())
    installed(folder, f"hello-1.{kind}", ENTRY)
    assert has_plugins(Config())


def test_one_in_an_archive_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "hello.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("hello-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: hello\nVersion: 1\n")
        bundle.writestr("hello-1.dist-info/entry_points.txt", ENTRY)
    assert not has_plugins(Config())
    monkeypatch.setattr(sys, "path", [str(path)])
    assert has_plugins(Config())


def test_those_that_a_configuration_names_count_too() -> None:
    assert has_plugins(Config(plugins_path="/plugins"))
    assert has_plugins(Config(plugin=("a:b",)))
    assert has_plugins(Config(middleware=("a:b",)))
