"""Unpacks a model archive (zip or tar.gz) that nobody vouches for; a failure leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from wsgi_ts.archive.entries import (
    DEFAULT_LIMITS,
    MAX_NAME_BYTES,
    ArchiveLimits,
    Extraction,
    damaged,
    refused,
    split_name,
)
from wsgi_ts.errors import InvalidModel, OutOfResources

#: What is told of a file whose first bytes are those of no archive.
NO_ARCHIVE = "Model archive is neither zip nor tar.gz."
_CHUNK_BYTES = 1 << 20


def extract_archive(source: Path, destination: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> None:
    """Unpacks `source` into the new directory `destination` (mode 0700); its kind is told by its first bytes.

    A zip is unpacked as it is; from a tar.gz the first path component of every entry is dropped. Files get
    mode 0600, or 0700 where the archive marks them executable.

    Raises:
        InvalidModel: not an archive, a damaged one, one with a forbidden entry, or one above a limit.
        OutOfResources: the disk is full.
        OSError: the archive cannot be read or the directory cannot be made.
    """
    with source.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            unpack = _unpack_tar
        elif magic in (b"PK\x03\x04", b"PK\x05\x06"):
            unpack = _unpack_zip
        else:
            raise InvalidModel(_what_is_it(magic))
        destination.mkdir(mode=0o700)
        try:
            extraction = Extraction(destination, limits, size)
            unpack(file, extraction)
            extraction.make_links()
        except BaseException as error:
            shutil.rmtree(destination, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfResources("Not enough disk space to extract the model archive.") from error
            raise


def _what_is_it(magic: bytes) -> str:
    if not magic:
        return "Model archive is empty (0 bytes)."
    if magic.lstrip()[:1] == b"<":
        return "Model archive is neither zip nor tar.gz: it looks like an HTML page."
    return NO_ARCHIVE


def _unpack_zip(file: BinaryIO, extraction: Extraction) -> None:
    try:
        directory_at = _check_zip_directory(file, extraction.limits)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            plan = [_plan_zip_entry(entry, extraction) for entry in entries]
            _check_no_overlap(file, entries, directory_at)
            extraction.expect(sum(entry.file_size for entry in entries))
            for entry, (name, parts) in zip(entries, plan, strict=True):
                _unpack_zip_entry(archive, entry, name, parts, extraction)
    except UnicodeDecodeError as error:
        raise InvalidModel("archive entry not allowed: (name is not UTF-8)") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
        raise damaged("a file in it is truncated or fails its checksum") from error
    except (NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise damaged("it uses a zip feature that is not supported") from error


def _check_zip_directory(file: BinaryIO, limits: ArchiveLimits) -> int:
    """Checks size and place of the central directory before it is read into memory; returns its offset.

    The record at the end has to be the very end, and the directory has to stand right before it: a second
    reader that looks elsewhere would see another archive.
    """
    size = file.seek(0, os.SEEK_END)
    tail_bytes = min(size, 22 + 65535)
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) - found < 22:
        raise damaged("it is truncated (no end record)")
    count, directory_bytes, directory_at, comment_bytes = struct.unpack_from("<HIIH", tail, found + 10)
    if found + 22 + comment_bytes != len(tail):
        raise damaged("there is other data behind it, or it is truncated")
    end_at = size - tail_bytes + found
    locator = tail[found - 20 : found] if found >= 20 else b""
    if locator[:4] == b"PK\x06\x07":
        end_at -= 20 + 56
        file.seek(max(0, end_at))
        record = file.read(56)
        if record[:4] != b"PK\x06\x06" or int.from_bytes(locator[8:16], "little") != end_at:
            raise damaged("its zip64 record is not where its locator says")
        count, directory_bytes, directory_at = struct.unpack_from("<QQQ", record, 32)
    if directory_at + directory_bytes != end_at:
        raise damaged("its directory is not where its end record says")
    too_many = InvalidModel(f"Model archive has more than {limits.max_entries} entries.")
    if count > limits.max_entries or directory_bytes > limits.max_entries * (46 + MAX_NAME_BYTES + 512):
        raise too_many
    file.seek(directory_at)
    if file.read(directory_bytes).count(b"PK\x01\x02") > limits.max_entries:
        raise too_many
    file.seek(0)
    return int(directory_at)


def _plan_zip_entry(entry: zipfile.ZipInfo, extraction: Extraction) -> tuple[str, list[str]]:
    """The checked name of an entry and its components."""
    name = entry.orig_filename
    if not entry.flag_bits & 0x800:
        # Without the flag the module decodes as cp437; archivers write UTF-8 and TorchServe reads UTF-8.
        name = name.encode("cp437").decode("utf-8", "surrogateescape")
    parts = split_name(name)
    is_directory = _is_zip_directory(name)
    wanted = (0, stat.S_IFDIR) if is_directory else (0, stat.S_IFREG, stat.S_IFLNK)
    if stat.S_IFMT(entry.external_attr >> 16) not in wanted or not (parts or is_directory):
        raise refused(name, "not a regular file or directory")
    if is_directory and entry.file_size:
        raise refused(name, "both a file and a directory")
    if entry.flag_bits & 0x41:
        raise refused(name, "encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refused(name, f"compression method {entry.compress_type}, only stored and deflated are read")
    extraction.names.add(name, parts, is_directory)
    return name, parts


def _is_zip_directory(name: str) -> bool:
    return name.endswith(("/", "\\"))


def _check_no_overlap(file: BinaryIO, entries: list[zipfile.ZipInfo], directory_at: int) -> None:
    """Refuses entries that share packed bytes: the trick of zip bombs without nesting."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends_before = [entry.header_offset for entry in ordered[1:]] + [directory_at]
    for entry, limit in zip(ordered, ends_before, strict=True):
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise damaged("an entry is not where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        if entry.header_offset + 30 + name_bytes + extra_bytes + entry.compress_size > limit:
            raise refused(entry.orig_filename, "overlaps another entry")


def _unpack_zip_entry(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, parts: list[str], extraction: Extraction
) -> None:
    mode = entry.external_attr >> 16
    if _is_zip_directory(name):
        extraction.add_directory(parts)
        return
    executable = bool(mode & 0o100)
    with archive.open(entry) as stream:
        if stat.S_ISLNK(mode):
            target = stream.read(MAX_NAME_BYTES).decode("utf-8", "surrogateescape")
            extraction.add_link(name, parts, target, is_hard=False)
            return
        written = extraction.add_file(parts, iter(lambda: stream.read(_CHUNK_BYTES), b""), executable)
    if written != entry.file_size:
        raise refused(name, f"is {written} bytes, but its header says {entry.file_size}")


def _unpack_tar(file: BinaryIO, extraction: Extraction) -> None:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as raw:
            stream = _TarStream(raw)
            with tarfile.TarFile(fileobj=cast("IO[bytes]", stream), encoding="utf-8") as archive:
                for count, member in enumerate(iter(archive.next, None), start=1):
                    if count > extraction.limits.max_entries:
                        raise InvalidModel(f"Model archive has more than {extraction.limits.max_entries} entries.")
                    _unpack_tar_member(stream, member, extraction)
            stream.finish()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise damaged("it is truncated, fails its checksum or is no tar archive") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise damaged("an entry's header cannot be read") from error


def _unpack_tar_member(stream: _TarStream, member: tarfile.TarInfo, extraction: Extraction) -> None:
    """Writes one member without its first path component, as TorchServe does."""
    name = member.name
    split_name(name)
    parts = _without_first(name, member.isdir())
    if member.isdir():
        extraction.names.add(name, parts, is_directory=True)
        extraction.add_directory(parts)
        return
    is_plain = member.isreg() and not member.issparse() and member.size >= 0
    if not (is_plain or member.issym() or member.islnk()) or not parts or name.endswith("/"):
        raise refused(name, "not a regular file or directory")
    extraction.names.add(name, parts, is_directory=False)
    if not is_plain:
        target = member.linkname if member.issym() else "/".join(_without_first(member.linkname, False))
        extraction.add_link(name, parts, target, is_hard=member.islnk())
        return
    stream.seek(member.offset_data)
    extraction.add_file(parts, stream.data(member.size), executable=bool(member.mode & 0o100))


def _without_first(name: str, is_directory: bool) -> list[str]:
    """What is left of a name without its first component, which may be a dot; a file at the top stays."""
    first, slash, rest = name.partition("/")
    if slash:
        return split_name(rest) if rest else []
    return [] if is_directory else split_name(first)


class _TarStream:
    """The few file methods that `tarfile` calls, over a stream that only goes forward.

    tarfile reads a long-name or pax header in one piece, however long it claims to be: `read`, which only
    headers go through, has a budget. It also steps back one byte before each header, which would make gzip
    start over: the last byte is kept for that.
    """

    _MAX_HEADER_BYTES = 1 << 20
    _MAX_HEADERS_BYTES = 64 << 20
    _MAX_PADDING_BYTES = 64 << 20

    def __init__(self, raw: gzip.GzipFile) -> None:
        self._raw = raw
        self._at = 0
        self._last = b""
        self._stepped_back = False
        self._headers_bytes = 0
        self._last_header = b""

    def tell(self) -> int:
        """The position in the unpacked stream, in bytes."""
        return self._at - self._stepped_back

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to `offset`: one byte back, or forward over the padding of a member."""
        gap = offset - self.tell()
        if whence != os.SEEK_SET or gap < -1 or gap > tarfile.BLOCKSIZE or (gap < 0 and self._stepped_back):
            raise tarfile.ReadError("bad offset")
        if gap < 0:
            self._stepped_back = True
        elif gap > 0:
            self._take(gap)
        return offset

    def read(self, size: int) -> bytes:
        """Reads (a part of) a header."""
        self._headers_bytes += size
        if size < 0 or size > self._MAX_HEADER_BYTES or self._headers_bytes > self._MAX_HEADERS_BYTES:
            raise tarfile.ReadError("header too large")
        self._last_header = self._take(size)
        return self._last_header

    def data(self, size: int) -> Iterator[bytes]:
        """The bytes of a member, in pieces."""
        while size:
            chunk = self._take(min(size, _CHUNK_BYTES))
            if not chunk:
                raise EOFError("member ends early")
            size -= len(chunk)
            yield chunk

    def finish(self) -> None:
        """Checks that the archive ended with a zero block or with the stream, and holds nothing after it."""
        padding_bytes = 0
        rest = self._last_header
        while True:
            padding_bytes += len(rest)
            if rest.strip(b"\0") or padding_bytes > self._MAX_PADDING_BYTES:
                raise damaged("a header in it is wrong, or there is other data behind it")
            rest = self._raw.read(_CHUNK_BYTES)
            if not rest:
                return

    def _take(self, size: int) -> bytes:
        head = b""
        if self._stepped_back and size:
            head, self._stepped_back = self._last, False
        body = b""
        while len(head) + len(body) < size:
            more = self._raw.read(size - len(head) - len(body))
            if not more:
                break
            body = body + more if body else more
            self._at += len(more)
        self._last = body[-1:] or self._last
        return head + body
