"""Writes an archive of files as zip, tar.gz or directory: whole or not at all, with progress if large."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

log = logging.getLogger(__name__)

#: File-name ending of each archive format.
FORMATS = {"default": ".mar", "zip-store": ".mar", "tgz": ".tar.gz", "no-archive": ""}

_CHUNK_BYTES = 1 << 20
#: Progress is shown where there is as much to pack.
_SHOWN_FROM_BYTES = 64_000_000
_SKIPPED_DIRECTORIES = ("__MACOSX", "__pycache__")


class ArchiverError(Exception):
    """The archive cannot be made: the text says what the caller has to change."""


class MissingFileError(ArchiverError, FileNotFoundError):
    """A file that is to be packed does not exist."""


@dataclass(slots=True)
class Contents:
    """What goes into an archive: for each name inside it, the file that it comes from.

    Args:
        output: the archive to be written; it and what lies below it is never packed into itself.
    """

    output: Path
    files: dict[str, Path] = field(default_factory=dict)

    def add_file(self, source: Path, name: str | None = None) -> None:
        """Adds one file, at the root of the archive unless `name` says otherwise.

        Raises:
            MissingFileError: there is no such file.
        """
        name = name or source.name
        if not source.is_file():
            raise MissingFileError(_what_is_missing(source))
        known = self.files.get(name)
        if known is not None and not known.samefile(source):
            log.warning("%s comes from both %s and %s: %s is packed.", name, known, source, source)
        self.files[name] = source

    def add_tree(self, directory: Path) -> None:
        """Adds what is in `directory`, but no hidden directories, __pycache__, __MACOSX; links are followed.

        Raises:
            ArchiverError: a link leads nowhere or back to a directory that it lies in.
        """
        self._walk(directory, "", {_identity(directory)})

    def _walk(self, directory: Path, prefix: str, above: set[tuple[int, int]]) -> None:
        for entry in sorted(directory.iterdir()):
            if entry.name == self.output.name and _same(entry, self.output):
                log.warning("%s is the archive being written: left out.", entry)
            elif not entry.is_dir():
                self.add_file(entry, prefix + entry.name)
            elif not entry.name.startswith(".") and entry.name not in _SKIPPED_DIRECTORIES:
                identity = _identity(entry)
                if identity in above:
                    raise ArchiverError(f"{entry} is a symbolic link to a directory that it lies in: remove the link.")
                self._walk(entry, f"{prefix}{entry.name}/", above | {identity})

    def total_bytes(self) -> int:
        """Returns the size of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and left.samefile(right)


def _what_is_missing(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"File does not exist: {path} (a symbolic link to nothing)"
    if path.exists():
        return f"Not a regular file: {path}"
    return f"File does not exist: {path}"


def write_archive(
    contents: Contents,
    documents: dict[str, str],
    archive_format: str,
    root_name: str,
    *,
    kind: str = "model",
    progress_to: TextIO | None = None,
) -> None:
    """Writes `contents` and `documents` to `contents.output`, which changes only once all of it is on disk.

    Args:
        contents: the files.
        documents: further text files by their name in the archive; they win over a file of the same name.
        archive_format: a key of `FORMATS`.
        root_name: the directory that a tgz has everything below.
        kind: "model" or "workflow", for the text of an error.
        progress_to: where progress of large archives is shown, standard error by default.

    Raises:
        ArchiverError: no permission, no space, or an input that cannot be read.
    """
    for name in documents:
        contents.files.pop(name, None)
    progress = _progress(contents, progress_to or sys.stderr)
    output = contents.output
    part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        with progress:
            if archive_format == "no-archive":
                _write_directory(part, contents, documents, progress)
                _put_directory(part, contents)
            else:
                with _new_file(part) as file:
                    if archive_format == "tgz":
                        _write_tar(file, contents, documents, root_name, progress)
                    else:
                        method = zipfile.ZIP_STORED if archive_format == "zip-store" else zipfile.ZIP_DEFLATED
                        _write_zip(file, contents, documents, method, progress)
                part.replace(output)
    except OSError as error:
        raise ArchiverError(
            f'Failed to save the {kind}-archive to {kind}-path "{output.parent}". '
            f"Check the file permissions and retry. ({error})"
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


class _PlainLines(tqdm):  # type: ignore[misc,unused-ignore]
    """tqdm where nobody looks at a terminal: a line each time, in place of one that is written over."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Returns what prints the state; tqdm ends the last line itself."""
        begun = False

        def print_line(text: str) -> None:
            nonlocal begun
            file.write(f"\n{text}" if begun else text)
            file.flush()
            begun = True

        return print_line


def _progress(contents: Contents, stream: TextIO) -> tqdm:
    """Returns what shows how much of the input is packed; nothing is shown where that is small."""
    total_bytes = contents.total_bytes()
    shown = tqdm if stream.isatty() else _PlainLines
    return shown(
        desc=contents.output.name,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        disable=total_bytes < _SHOWN_FROM_BYTES,
        file=stream,
        mininterval=0.1 if stream.isatty() else 3.0,
    )


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, on disk when the block ends well."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: IO[bytes], progress: tqdm) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(CallbackIOWrapper(progress.update, file, "read"), target, _CHUNK_BYTES)


def _write_zip(file: BinaryIO, contents: Contents, documents: dict[str, str], method: int, progress: tqdm) -> None:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, source in contents.files.items():
            entry = zipfile.ZipInfo.from_file(source, name, strict_timestamps=False)
            entry.compress_type = archive.compression
            with archive.open(entry, "w") as target:
                _copy(source, target, progress)
        for name, text in documents.items():
            archive.writestr(name, text)


def _write_tar(file: BinaryIO, contents: Contents, documents: dict[str, str], root_name: str, progress: tqdm) -> None:
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, source in contents.files.items():
            with source.open("rb") as opened:
                status = os.fstat(opened.fileno())
                entry = tarfile.TarInfo(f"{root_name}/{name}")
                entry.size = status.st_size
                entry.mtime = int(status.st_mtime)
                entry.mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
                archive.addfile(entry, CallbackIOWrapper(progress.update, opened, "read"))
        for name, text in documents.items():
            entry = tarfile.TarInfo(f"{root_name}/{name}")
            entry.size = len(text.encode())
            entry.mtime = int(time.time())
            archive.addfile(entry, io.BytesIO(text.encode()))


def _write_directory(path: Path, contents: Contents, documents: dict[str, str], progress: tqdm) -> None:
    path.mkdir()
    for name, source in contents.files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            _copy(source, file, progress)
        shutil.copymode(source, target)
    for name, text in documents.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _put_directory(part: Path, contents: Contents) -> None:
    """Lets the finished directory take the output's place.

    An earlier no-archive output is replaced as a whole. Any other directory, and one that the files come
    from, keeps what it has: files are only added and overwritten, as TorchServe's archiver does.
    """
    output = contents.output
    if not os.path.lexists(output):
        part.rename(output)
        return
    if not output.is_dir():
        raise ArchiverError(f"{output} is a file: remove it, or choose another --export-path.")
    inputs_inside = any(source.resolve().is_relative_to(output.resolve()) for source in contents.files.values())
    if inputs_inside or output.is_symlink() or not (output / "MAR-INF" / "MANIFEST.json").is_file():
        for source in sorted(part.rglob("*")):
            target = output / source.relative_to(part)
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                source.replace(target)
        return
    old = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    output.rename(old)
    part.rename(output)
    shutil.rmtree(old, ignore_errors=True)
