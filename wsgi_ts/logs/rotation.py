"""Rotation of the log files: one owner, the supervisor, for files that all processes of the instance append to.

A file that is due is renamed, and every process is told to open its name again. Lines written meanwhile are in the
renamed file, so none is lost; it is compressed when no process has it open for writing any more.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: How often the files are looked at, in seconds.
LOOK_S = 1.0
#: A process that still writes to a renamed file is told again after this time, in seconds.
ASK_AGAIN_S = 5.0
#: After a file could not be renamed, how long it is left alone, in seconds.
_RETRY_S = 60.0
#: A period is over when this text of the time has changed.
PERIODS = {
    "second": "%Y-%j-%H-%M-%S",
    "minute": "%Y-%j-%H-%M",
    "hour": "%Y-%j-%H",
    "day": "%Y-%j",
    "week": "%G-%V",
    "month": "%Y-%m",
}
_COMPRESSED = ".gz"
_PART = ".part"
_PROC = Path("/proc")
#: strftime's codes that give words; the others that make sense in a name give digits.
_WORDS = ("%a", "%A", "%b", "%B", "%p", "%Z")


@dataclass(frozen=True, slots=True)
class Rotation:
    """When a file is rotated, into what, and how many of those are kept.

    Attributes:
        max_bytes: from this size on; 0 for any size.
        period: and when a new one of PERIODS begins; empty for no such limit.
        keep: rotated files that are kept, the newest; 0 for all.
        archive: path of the rotated file: strftime's codes for the time at which the file was begun, `%i` for a
            number; without it a number is put before the suffix where the name is taken. `.gz` at the end compresses.
    """

    max_bytes: int
    period: str
    keep: int
    archive: str

    def is_due(self, size: int, began_at: float, now: float) -> bool:
        """Whether a file of this size in bytes, begun then (seconds since the epoch), is rotated now."""
        if size == 0:
            return False
        if 0 < self.max_bytes <= size:
            return True
        code = PERIODS.get(self.period)
        return code is not None and _at(code, began_at) != _at(code, now)

    def names(self, began_at: float) -> Iterator[Path]:
        """The names that a file begun then may get, best first, compressed."""
        numbered = self.archive.replace("%%", "\0").replace("%i", "\1").replace("\0", "%%")
        name = _at(numbered, began_at)
        if "\1" not in name:
            yield Path(name)
            stem, suffix = _split(name)
            name = f"{stem}.\1{suffix}"
        for number in range(1, 1_000_000):
            yield Path(name.replace("\1", str(number)))

    def archives(self) -> list[Path]:
        """The rotated files that are there, oldest first, compressed or not yet."""
        folder, name = os.path.split(self.archive)
        if "%" in folder.replace("%%", ""):
            # The time is part of a folder's name: there is no one place to look at.
            return []
        stem, suffix = _split(name)
        suffix = suffix.removesuffix(_COMPRESSED)
        wanted = re.compile(rf"{_as_regex(stem)}(?:\.\d+)?{re.escape(suffix)}(?:{re.escape(_COMPRESSED)})?")
        found = []
        with contextlib.suppress(OSError), os.scandir(folder.replace("%%", "%") or ".") as entries:
            for entry in entries:
                if wanted.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
        return [path for _, path in sorted(found)]


class LogRotation:
    """Rotates the files of an instance, on a thread of its own: a slow disk holds up nobody else.

    Args:
        began_at: when each file was begun, as far as that is known (seconds since the epoch).
        reopen: has every process of the instance open its log files again; returns at once.
    """

    def __init__(
        self, files: Mapping[Path, Rotation], began_at: Mapping[Path, float], reopen: Callable[[], None]
    ) -> None:
        self._files = dict(files)
        self._reopen = reopen
        self._began_at = dict(began_at)
        self._not_before: dict[Path, float] = {}
        #: Renamed files that are not compressed yet.
        self._renamed: list[tuple[Path, Rotation]] = []
        self._asked_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log rotation", daemon=True)

    def start(self) -> None:
        """Begins, with what an earlier instance may have left uncompressed."""
        for path, rotation in self._files.items():
            left = [each for each in rotation.archives() if each != path and each.suffix != _COMPRESSED]
            if rotation.archive.endswith(_COMPRESSED):
                self._renamed += [(each, rotation) for each in left]
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is not compressed is found by the next start."""
        self._stopping.set()
        self._thread.join(LOOK_S)

    def look(self, now: float) -> None:
        """Rotates what is due at `now` (seconds since the epoch), and compresses what nobody writes to any more."""
        renamed = [self._rename(path, rotation, now) for path, rotation in self._files.items()]
        if any(renamed):
            self._ask(now)
        if not self._renamed:
            return
        busy = _being_written({path for path, _ in self._renamed})
        for path, rotation in self._renamed.copy():
            if path not in busy:
                self._renamed.remove((path, rotation))
                _compress(path, rotation)
                _remove_old(rotation)
        if self._renamed and abs(now - self._asked_at) >= ASK_AGAIN_S:
            self._ask(now)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self.look(time.time())
            except Exception:
                log.exception("Log rotation failed")

    def _ask(self, now: float) -> None:
        self._asked_at = now
        self._reopen()

    def _rename(self, path: Path, rotation: Rotation, now: float) -> bool:
        """Renames a file if it is due; whether it did."""
        try:
            status = path.stat()
        except OSError:
            self._began_at.pop(path, None)
            return False
        began_at = self._began_at.setdefault(path, now)
        if status.st_size == 0:
            self._began_at[path] = now
        if not rotation.is_due(status.st_size, began_at, now) or now < self._not_before.get(path, 0.0):
            return False
        target = next(name for name in rotation.names(began_at) if not _taken(name))
        bare = target.with_suffix("") if target.suffix == _COMPRESSED else target
        try:
            bare.parent.mkdir(parents=True, exist_ok=True)
            path.rename(bare)
        except OSError as error:
            self._not_before[path] = now + _RETRY_S
            log.warning("Cannot rotate %s into %s: %s", path, bare, error.strerror)
            return False
        self._began_at[path] = now
        self._renamed.append((bare, rotation))
        return True


def _at(code: str, moment: float) -> str:
    return time.strftime(code, time.localtime(moment))


def _split(name: str) -> tuple[str, str]:
    """A name before its suffix (`.log.gz`, `.gz`, `.log`), and the suffix."""
    suffixes = re.search(r"(\.[A-Za-z]\w*)?\.gz$|\.[A-Za-z]\w*$", name)
    at = suffixes.start() if suffixes else len(name)
    return name[:at], name[at:]


def _as_regex(template: str) -> str:
    """What names a strftime template can give."""
    parts = re.split(r"(%.)", template)
    return "".join(
        "%" if part == "%%" else re.escape(part) if part[:1] != "%" else r"[^\W\d]+" if part in _WORDS else r"\d+"
        for part in parts
    )


def _taken(name: Path) -> bool:
    """Whether a rotated file of this name is there, compressed or not yet."""
    bare = name.with_suffix("") if name.suffix == _COMPRESSED else name
    return os.path.lexists(name) or os.path.lexists(bare)


def _being_written(paths: set[Path]) -> set[Path]:
    """Which of the files some process of this user has open for writing."""
    wanted = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            wanted[status.st_dev, status.st_ino] = path
    found = set()
    for process in _PROC.iterdir():
        # Processes of other users cannot be read and write to none of our files; others end while we look.
        with contextlib.suppress(OSError):
            if not process.name.isdigit():
                continue
            for fd in os.listdir(process / "fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(process / "fd" / fd)
                    file = wanted.get((status.st_dev, status.st_ino))
                    if file is not None and _writes(process / "fdinfo" / fd):
                        found.add(file)
    return found


def _writes(fdinfo: Path) -> bool:
    flags = re.search(r"^flags:\s*([0-7]+)", fdinfo.read_text(), re.MULTILINE)
    return flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _compress(path: Path, rotation: Rotation) -> None:
    """Compresses a rotated file if its name says so; where that fails it stays as it is."""
    if not rotation.archive.endswith(_COMPRESSED):
        return
    target, part = (path.with_name(path.name + suffix) for suffix in (_COMPRESSED, _COMPRESSED + _PART))
    try:
        status = path.stat()
        with path.open("rb") as source, gzip.open(part, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        os.chmod(part, status.st_mode & 0o777)
        # So that age, by which old ones are removed, stays what it was.
        os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
        part.rename(target)
        path.unlink()
    except FileNotFoundError:
        log.info("The rotated log %s was removed before it was compressed", path)
    except OSError as error:
        log.warning("Cannot compress the rotated log %s: %s; it stays as it is", path, error.strerror)
        part.unlink(missing_ok=True)


def _remove_old(rotation: Rotation) -> None:
    """Removes the oldest rotated files beyond those that are kept."""
    if rotation.keep <= 0:
        return
    for path in rotation.archives()[: -rotation.keep]:
        try:
            path.unlink()
        except OSError as error:
            log.warning("Cannot remove the old log %s: %s", path, error.strerror)
