"""What an archive may hold and what it may cost: names, sizes, and the one place where its files are written.

Every entry name is checked component by component before anything is written, and bytes are counted while
they are written. The texts go to the client: they name an entry of the archive, never a path of this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from wsgi_ts.errors import InvalidModel, OutOfResources
from wsgi_ts.quick_dataclass import dataclass

MAX_NAME_BYTES = 1024
_MAX_COMPONENT_BYTES = 255
_MAX_DEPTH = 64


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
    """The components of an entry's name below the model directory; none for the directory itself.

    What is harmless is put right: `./`, doubled slashes, a slash at the start or end, `a/../b`, and the backslashes of
    archivers on Windows.

    Raises:
        InvalidModel: it leaves the model directory, or cannot be a name here.
    """
    fault = _name_fault(name)
    if fault is not None:
        raise refused(name, fault)
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                raise refused(name, "leaves the model directory")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _name_fault(name: str) -> str | None:
    """Why an entry's name is refused, None where it is fine."""
    parts = name.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
        too_long = len(name.encode()) > MAX_NAME_BYTES or longest > _MAX_COMPONENT_BYTES
    except UnicodeEncodeError:
        return "name is not UTF-8"
    faults = (
        (not name, "empty name"),
        (too_long or len(parts) > _MAX_DEPTH, "name too long or too deep"),
        ("\0" in name, "NUL in name"),
    )
    return next((text for wrong, text in faults if wrong), None)


class _Names:
    """The paths taken so far: None for a directory, for a file the name (put right) of the entry that it is from."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._taken: dict[tuple[str, ...], str | None] = {}

    def add(self, name: str, parts: list[str], is_directory: bool) -> None:
        """Takes the path and its parents; an entry may come again, as archivers append a newer file.

        Raises:
            InvalidModel: it collides with another entry, or there are too many.
        """
        for depth in range(1, len(parts)):
            self._take(name, tuple(parts[:depth]), None)
        self._take(name, tuple(parts), None if is_directory else "/".join(split_name(name)))
        if len(self._taken) > self._limits.max_entries:
            raise InvalidModel(f"Model archive has more than {self._limits.max_entries} entries.")

    def _take(self, name: str, path: tuple[str, ...], entry: str | None) -> None:
        known = self._taken.setdefault(path, entry)
        if (known is None) != (entry is None):
            raise refused(name, "both a file and a directory")
        if known != entry:
            raise refused(name, f"unpacked it would be the same file as {escape_name(str(known))}")


@dataclass(frozen=True, slots=True)
class _Link:
    """A link to be made when all files are there: the entry's name, and what it leads to."""

    name: str
    target: str
    is_hard: bool


class Extraction:
    """The directory being filled, with the counters that stop it."""

    def __init__(self, root: Path, limits: ArchiveLimits, packed_bytes: int) -> None:
        self.limits = limits
        self.names = _Names(limits)
        self._root = root
        self._packed_bytes = max(1, packed_bytes)
        self._written = 0
        self._links: dict[tuple[str, ...], _Link] = {}

    def expect(self, total: int) -> None:
        """Refuses at once what the archive itself says will not fit."""
        self._check_size(total)
        if total > shutil.disk_usage(self._root).free:
            raise OutOfResources("Not enough disk space to extract the model archive.")

    def add_directory(self, parts: list[str]) -> None:
        """Makes a directory and its parents."""
        path = self._root
        for part in parts:
            path = path / part
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)

    def add_file(self, parts: list[str], chunks: Iterator[bytes], executable: bool) -> int:
        """Writes one file, in place of an earlier one of that name; returns its bytes."""
        self.add_directory(parts[:-1])
        self._links.pop(tuple(parts), None)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        written = 0
        file_fd = os.open(self._root.joinpath(*parts), flags, 0o700 if executable else 0o600)
        with open(file_fd, "wb", buffering=0) as file:
            for chunk in chunks:
                self._written += len(chunk)
                written += len(chunk)
                self._check_size(self._written)
                _write_all(file, chunk)
        return written

    def add_link(self, name: str, parts: list[str], target: str, *, is_hard: bool) -> None:
        """Keeps a link for `make_links`: while files are written none is there that could lead them elsewhere.

        Its target is relative to its directory; that of a hard link, a second name, is the path of the other entry.

        Raises:
            InvalidModel: it leads out of the model directory.
        """
        if target.startswith("/") or "\0" in target or not target:
            raise refused(name, "a link out of the model directory")
        self._links[tuple(parts)] = _Link(name, target, is_hard)

    def make_links(self) -> None:
        """Makes all links, when all files are written.

        Raises:
            InvalidModel: one leads out of the model directory, or is a hard link to no file.
        """
        for parts, link in sorted(self._links.items(), key=lambda item: not item[1].is_hard):
            path = self._root.joinpath(*parts)
            self.add_directory(list(parts[:-1]))
            if link.is_hard:
                source = self._root.joinpath(*split_name(link.target))
                if source == path or not source.is_file():
                    raise refused(link.name, "a link to a file that is not there")
                path.unlink(missing_ok=True)
                os.link(source, path, follow_symlinks=False)
            else:
                path.unlink(missing_ok=True)
                path.symlink_to(link.target)
        # One link may go through another: only now can be seen where each of them leads.
        root = self._root.resolve()
        for parts, link in self._links.items():
            if not Path(os.path.realpath(self._root.joinpath(*parts))).is_relative_to(root):
                raise refused(link.name, "a link out of the model directory")

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
