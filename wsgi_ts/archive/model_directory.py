"""From the `url` of a register call to a model directory with a checked manifest.

`open_archive` finds (or downloads) the archive, unpacks it, reads MAR-INF/MANIFEST.json and checks that what it names
lies inside the model directory. Directories are used where they are. Whatever fails, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from pathlib import Path

from wsgi_ts.archive.download import DownloadRules, fetch_archive, is_fetched
from wsgi_ts.archive.entries import DEFAULT_LIMITS, ArchiveLimits, escape_name
from wsgi_ts.archive.extract import extract_archive
from wsgi_ts.archive.manifest import MANIFEST_PATH, Manifest, check_name, read_manifest
from wsgi_ts.errors import InternalServerError, ModelNotFound
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: What the Finder leaves beside the files.
_LEFT_BY_MACOS = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A model on disk, ready for its workers.

    Args:
        path: absolute directory with the model's files.
        extracted: whether `path` was made by `open_archive` (and is removed with the model).
        downloaded: the file that was fetched into the model store for it, if any.
        archive: the file that `path` was unpacked from, None for a directory that is used in place.
    """

    path: Path
    manifest: Manifest
    url: str
    extracted: bool
    downloaded: Path | None = None
    archive: Path | None = None


def open_archive(
    url: str,
    model_store: Path | None,
    models_dir: Path,
    *,
    limits: ArchiveLimits = DEFAULT_LIMITS,
    rules: DownloadRules | None = None,
    model_name: str | None = None,
    any_directory: bool = False,
) -> ModelDirectory:
    """Finds, fetches, unpacks and checks the model at `url`.

    Args:
        url: a file name in the model store, a path whose last part is one, a directory, or a URL.
        model_store: the store, None where none is configured.
        models_dir: where archives are unpacked, each in a new directory; made if missing.
        limits: sizes and times that end the attempt.
        rules: which URLs may be fetched; by default those that TorchServe allows.
        model_name: the name that the register call gave, in place of the manifest's.
        any_directory: whether a directory may lie outside of the model store.

    Raises:
        ModelNotFound: nothing there, or a URL that is not allowed.
        DownloadFailed: the URL could not be fetched.
        InvalidModel: the archive or its manifest is wrong, or not safe.
        BadRequest: `model_name` cannot be part of an address.
        OutOfResources: the disk is full.
        InternalServerError: the model store already has a file of that name, or a file operation failed.
    """
    if model_name:
        check_name("Model name", model_name)
    undo = contextlib.ExitStack()
    try:
        with undo:
            source, fetched = _locate(url, model_store, rules or DownloadRules(), limits, any_directory)
            if fetched:
                undo.callback(source.unlink, missing_ok=True)
            extracted = not source.is_dir()
            directory = _unpack_model(source, models_dir, limits, undo) if extracted else _innermost(source.resolve())
            manifest = read_manifest(directory, model_name, limits)
            undo.pop_all()
    except OSError as error:
        log.error("Failed to open the model archive %s: %s", escape_name(url), error)
        raise InternalServerError(f"Failed to save model: {url}") from error
    downloaded, archive = source if fetched else None, source if extracted else None
    return ModelDirectory(directory, manifest, url, extracted, downloaded, archive)


def unpack(source: Path, parent: Path, limits: ArchiveLimits, undo: contextlib.ExitStack) -> Path:
    """Unpacks an archive into a new directory in `parent`, which `undo` removes; raises what `extract_archive` does."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = parent.absolute() / uuid.uuid4().hex
    undo.callback(shutil.rmtree, directory, ignore_errors=True)
    extract_archive(source, directory, limits)
    return directory


def _unpack_model(source: Path, models_dir: Path, limits: ArchiveLimits, undo: contextlib.ExitStack) -> Path:
    directory = unpack(source, models_dir, limits, undo)
    inner = _innermost(directory)
    if inner == directory or not (inner / MANIFEST_PATH).is_file():
        return directory
    # All of it lies in a folder, as unpacking and packing by hand leaves one.
    moved = directory.with_name(uuid.uuid4().hex)
    inner.rename(moved)
    undo.callback(shutil.rmtree, moved, ignore_errors=True)
    shutil.rmtree(directory)
    return moved


def empty_model_directory(models_dir: Path, name: str, version: str, url: str) -> ModelDirectory:
    """A model directory without any file, as TorchServe makes it of an archive that it cannot read."""
    directory = models_dir.absolute() / uuid.uuid4().hex
    directory.mkdir(mode=0o700, parents=True)
    return ModelDirectory(directory, Manifest(name, version), url, extracted=True)


def remove_model_directory(model: ModelDirectory) -> None:
    """Deletes what `open_archive` unpacked; a directory that was used in place stays."""
    if model.extracted:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(model.path)


def remove_downloaded_archive(model: ModelDirectory) -> None:
    """Deletes the file that was fetched into the model store, so that its URL can be registered again.

    For a successful unregistration only: at shutdown the file stays.
    """
    if model.downloaded is not None:
        model.downloaded.unlink(missing_ok=True)


def _locate(
    url: str, model_store: Path | None, rules: DownloadRules, limits: ArchiveLimits, any_directory: bool
) -> tuple[Path, bool]:
    """The archive file or directory, and whether it was fetched for this call."""
    if model_store is None:
        raise ModelNotFound("Model store has not been configured.")
    if not url:
        raise ModelNotFound("empty url")
    fetched = is_fetched(url, rules)
    if ".." in (url.partition("?")[0] if fetched else url):
        raise ModelNotFound(f"Relative path is not allowed in url: {url}")
    if fetched:
        return fetch_archive(url, model_store, rules, limits), True
    base_name = os.path.basename(url.rstrip("/"))
    in_store = os.path.join(model_store, base_name)
    if base_name not in ("", ".") and os.path.isfile(in_store):
        return Path(in_store), False
    # A bare name means the store; only then a directory of that name where the server was started.
    candidates = [url, in_store] if "/" in url else [in_store, url]
    for candidate in candidates:
        if base_name in ("", ".") or not os.path.isdir(candidate):
            continue
        if any_directory or candidate == in_store or Path(candidate).resolve().is_relative_to(model_store.resolve()):
            return Path(candidate), False
    raise ModelNotFound(f"Model not found at: {url}")


def _innermost(directory: Path) -> Path:
    """Goes down into a lone nested directory, as unpacking a tar file by hand leaves one."""
    entries = [entry for entry in directory.iterdir() if entry.name not in _LEFT_BY_MACOS]
    if len(entries) == 1 and entries[0].is_dir() and entries[0].name != MANIFEST_PATH.parts[0]:
        return entries[0].resolve()
    return directory
