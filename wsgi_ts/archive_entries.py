"""What an archive may hold and what it may cost: names, sizes, and the one place where its files are written.

Every entry name is checked component by component before anything is written, and bytes are counted while
they are written. The texts go to the client: they name an entry of the archive, never a path of this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wsgi_ts.errors import InvalidModel, OutOfResources

MAX_NAME_BYTES = 1024
_MAX_COMPONENT_BYTES = 255
_MAX_DEPTH = 64
_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may cost.

    Args:
        max_archive_bytes: bytes after extraction, and bytes of a download.
        max_entries: files and directories in one archive.
        max_ratio: extracted to packed bytes; looked at only above `ratio_floor_bytes` extracted bytes.
        ratio_floor_bytes: see `max_ratio`.
        max_manifest_bytes: size of MAR-INF/MANIFEST.json.
        max_config_bytes: size of a model-config.yaml.
        download_timeout_s: a whole download, redirects included, in seconds.
        stall_timeout_s: the longest wait for the next byte of a download, in seconds.
    """

    max_archive_bytes: int = 256 << 30
    max_entries: int = 10_000
    max_ratio: int = 200
    ratio_floor_bytes: int = 100_000_000
    max_manifest_bytes: int = 1 << 20
    max_config_bytes: int = 1 << 20
    download_timeout_s: float = 3600.0
    stall_timeout_s: float = 30.0


DEFAULT_LIMITS = ArchiveLimits()


def escape_name(name: str) -> str:
    """`name` as printable ASCII of at most 200 characters, fit for a log line and for an answer."""
    escaped = name.encode("unicode_escape", "backslashreplace").decode("ascii")
    return escaped if len(escaped) <= 200 else escaped[:197] + "..."


def refused(name: str, why: str) -> InvalidModel:
    """The error for an entry that is not unpacked."""
    return InvalidModel(f"archive entry not allowed: {escape_name(name)} ({why})")


def damaged(why: str) -> InvalidModel:
    """The error for an archive that cannot be read to its end."""
    return InvalidModel(f"Model archive is damaged: {why}.")


def split_name(name: str) -> list[str]:
    """The components of an entry's name (without a final slash), each of them fit to be a file name here.

    Raises:
        InvalidModel: some part of the name is not allowed.
    """
    trimmed = name[:-1] if name.endswith("/") else name
    fault = _name_fault(name, trimmed)
    if fault is not None:
        raise refused(name, fault)
    return trimmed.split("/")


def _name_fault(name: str, trimmed: str) -> str | None:
    """Why an entry's name is refused, None where it is fine."""
    parts = trimmed.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
        too_long = len(name.encode()) > MAX_NAME_BYTES or longest > _MAX_COMPONENT_BYTES
    except UnicodeEncodeError:
        return "name is not UTF-8"
    faults = (
        (not trimmed, "empty name" if not name else "absolute path"),
        (too_long or len(parts) > _MAX_DEPTH, "name too long or too deep"),
        (_CONTROL.search(name) is not None, "control character in name"),
        ("\\" in name, "backslash in name"),
        (trimmed.startswith("/"), "absolute path"),
        (_DRIVE.match(trimmed) is not None, "drive letter"),
        (".." in parts, "leaves the model directory"),
        ("." in parts or "" in parts, "empty or '.' path component"),
    )
    return next((text for wrong, text in faults if wrong), None)


class _Names:
    """The paths taken so far, compared as a file system that ignores case and Unicode form would do it."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._taken: dict[str, tuple[str, bool, bool]] = {}

    def add(self, name: str, parts: list[str], is_directory: bool) -> None:
        """Take the path and its parents, or raise for what it collides with."""
        for depth in range(1, len(parts)):
            self._take(name, "/".join(parts[:depth]), is_directory=True, named=False)
        self._take(name, "/".join(parts), is_directory=is_directory, named=True)
        if len(self._taken) > self._limits.max_entries:
            raise InvalidModel(f"Model archive has more than {self._limits.max_entries} entries.")

    def _take(self, name: str, path: str, is_directory: bool, named: bool) -> None:
        key = unicodedata.normalize("NFC", path).casefold()
        known = self._taken.get(key)
        if known is None:
            self._taken[key] = (path, is_directory, named)
            return
        other, other_is_directory, other_named = known
        if other != path:
            raise refused(name, "differs from another entry only by case or Unicode form")
        if other_is_directory != is_directory:
            raise refused(name, "both a file and a directory")
        if named and (other_named or not is_directory):
            raise refused(name, "appears twice")
        self._taken[key] = (path, is_directory, named or other_named)


class Extraction:
    """The directory being filled, with the counters that stop it."""

    def __init__(self, root: Path, limits: ArchiveLimits, packed_bytes: int) -> None:
        """Fill `root` from an archive of `packed_bytes`."""
        self.limits = limits
        self.names = _Names(limits)
        self._root = root
        self._packed_bytes = max(1, packed_bytes)
        self._written = 0

    def expect(self, total: int) -> None:
        """Refuse at once what the archive itself says will not fit."""
        self._check_size(total)
        if total > shutil.disk_usage(self._root).free:
            raise OutOfResources("Not enough disk space to extract the model archive.")

    def add_directory(self, parts: list[str]) -> None:
        """Make a directory and its parents."""
        path = self._root
        for part in parts:
            path = path / part
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)

    def add_file(self, parts: list[str], chunks: Iterator[bytes], executable: bool) -> int:
        """Write one new file; returns its bytes."""
        self.add_directory(parts[:-1])
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        written = 0
        file_fd = os.open(self._root.joinpath(*parts), flags, 0o700 if executable else 0o600)
        with open(file_fd, "wb", buffering=0) as file:
            for chunk in chunks:
                self._written += len(chunk)
                written += len(chunk)
                self._check_size(self._written)
                _write_all(file, chunk)
        return written

    def _check_size(self, total: int) -> None:
        limits = self.limits
        if total > limits.max_archive_bytes:
            raise InvalidModel(
                f"Model archive is too large: more than {limits.max_archive_bytes} bytes when extracted."
            )
        if total > limits.ratio_floor_bytes and total > limits.max_ratio * self._packed_bytes:
            raise InvalidModel(
                f"Model archive expands to more than {limits.max_ratio} times its size: taken for a zip bomb."
            )


def _write_all(file: IO[bytes], chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
