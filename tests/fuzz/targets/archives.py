"""What an archive brings: the archive itself, its manifest, its model-config.yaml."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path

from wsgi_ts.archive.entries import ArchiveLimits
from wsgi_ts.archive.extract import extract_archive
from wsgi_ts.archive.manifest import MANIFEST_PATH, load_model_yaml, read_manifest
from wsgi_ts.errors import InvalidModel, ServerError
from wsgi_ts.models.model_yaml import check_parallel, launch_options, parse_model_yaml

_LIMITS = ArchiveLimits(max_archive_bytes=100_000, max_entries=50)
_root = tempfile.TemporaryDirectory(prefix="wts-fuzz-")
_ROOT = Path(_root.name)
_SOURCE, _TARGET = _ROOT / "x.mar", _ROOT / "in" / "out"
_TARGET.parent.mkdir()


def zip_archive(data: bytes) -> None:
    """A zip leaves nothing, or files inside its folder, within the limits."""
    _extract(data)


def tar_archive(data: bytes) -> None:
    """A tar.gz likewise. What is no gzip is packed first, so that what is inside can be reached."""
    _extract(data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1))


def _extract(data: bytes) -> None:
    _SOURCE.write_bytes(data)
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        extract_archive(_SOURCE, _TARGET, _LIMITS)
    except ServerError as error:
        assert 400 <= error.status < 500, error
        assert error.message.isprintable() and str(_ROOT) not in error.message, error.message
        assert not os.path.lexists(_TARGET)
    else:
        files = [path for path in _TARGET.rglob("*") if path.is_file() and not path.is_symlink()]
        assert sum(path.stat().st_size for path in files) <= _LIMITS.max_archive_bytes
        for path in _TARGET.rglob("*"):
            assert not os.path.lexists(path) or Path(os.path.realpath(path)).is_relative_to(_TARGET), path
            assert path.is_symlink() or path.is_dir() or path.is_file(), path
            assert path.is_symlink() or not path.stat().st_mode & 0o7077, path
        shutil.rmtree(_TARGET)
    assert sorted(os.listdir(_ROOT)) == ["in", "x.mar"] and not os.listdir(_TARGET.parent)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def manifest(data: bytes) -> None:
    """A manifest is refused as a 4xx, or names files of its own folder only."""
    folder = _ROOT / "model"
    (folder / MANIFEST_PATH.parent).mkdir(parents=True)
    try:
        (folder / MANIFEST_PATH).write_bytes(data)
        (folder / "handler.py").touch()
        (folder / "weights.pt").touch()
        try:
            found = read_manifest(folder, None, _LIMITS)
        except ServerError as error:
            assert 400 <= error.status < 500 and error.message.isprintable(), error.message
            return
        names = [found.serialized_file, found.model_file, found.config_file, found.requirements_file, found.handler]
        for entry in filter(None, names):
            for name in entry.split(","):
                path = os.path.normpath(folder / name.strip().partition(":")[0])
                assert Path(path).is_relative_to(folder), name
        for part in (found.model_name, found.model_version):
            assert part not in ("", ".", "..") and "/" not in part and "\0" not in part
    finally:
        shutil.rmtree(folder)


def model_yaml(data: bytes) -> None:
    """A model-config.yaml costs a warning at the most; contradictions are refused."""
    _SOURCE.write_bytes(data)
    yaml = parse_model_yaml(load_model_yaml(_SOURCE))
    assert yaml.batch_size >= 0 and yaml.min_workers >= 0 and yaml.response_timeout_s >= 1
    try:
        check_parallel(yaml)
    except InvalidModel:
        return
    launch_options(yaml)
