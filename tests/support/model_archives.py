"""Model archives with whatever lies and damage a test wants in them, and a place to open them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.archive.model_directory import ModelDirectory, open_archive
from wsgi_ts.errors import (
    InvalidModel,
    ServerError,
)

MANIFEST: dict[str, Any] = {
    "createdOn": "21/11/2026 00:27:43",
    "runtime": "python",
    "model": {"modelName": "probe", "handler": "probe_handler.py", "modelVersion": "1.0"},
    "archiverVersion": "0.12.0",
}
HANDLER = b"def handle(data, context):\n    return data\n"


class Place:
    """A model store and a directory for extracted models, in a root that is watched for strays."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "store"
        self.models = root / "run" / "models"
        self.store.mkdir()

    def open(self, url: str, **options: Any) -> ModelDirectory:
        """Open an archive of this place's store."""
        return open_archive(url, self.store, self.models, **options)

    def tree(self) -> set[str]:
        """Everything below the root but the models directory itself."""
        found = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        return found - {"run", "run/models"}

    def refuse(self, url: str, kind: type[ServerError] = InvalidModel, **options: Any) -> str:
        """Check that opening fails, cleanly and without a path of ours in the text; returns the text."""
        before = self.tree()
        with pytest.raises(kind) as caught:
            self.open(url, **options)
        assert self.tree() == before
        assert str(self.root) not in caught.value.message
        caught.value.message.encode("utf-8")
        return caught.value.message


def mar(
    path: Path,
    files: dict[str, bytes] | None = None,
    manifest: dict[str, Any] | None = MANIFEST,
    method: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """Write a model archive."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in ({"probe_handler.py": HANDLER} if files is None else files).items():
            archive.writestr(name, content)
        if manifest is not None:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


def with_model(**changes: Any) -> dict[str, Any]:
    """The manifest with some keys of its model changed."""
    return {**MANIFEST, "model": {**MANIFEST["model"], **changes}}


class Raw:
    """One zip entry, with whatever lies the test wants in its headers."""

    def __init__(
        self,
        name: bytes,
        content: bytes = b"x",
        *,
        mode: int = 0,
        flags: int = 0,
        method: int = 8,
        size: int | None = None,
        packed_size: int | None = None,
        crc: int | None = None,
        share_previous: bool = False,
    ) -> None:
        content = b"" if name.endswith(b"/") else content
        deflate = zlib.compressobj(wbits=-15)
        self.name = name
        self.packed = deflate.compress(content) + deflate.flush()
        self.fields = (
            flags,
            method,
            0,
            0x21,
            zlib.crc32(content) if crc is None else crc,
            len(self.packed) if packed_size is None else packed_size,
            len(content) if size is None else size,
        )
        self.mode = mode
        self.share_previous = share_previous


def raw_zip(entries: list[Raw]) -> bytes:
    """A zip with exactly these entries."""
    body, directory, offset = b"", b"", 0
    for entry in entries:
        if not entry.share_previous:
            offset = len(body)
            body += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, *entry.fields, len(entry.name), 0)
            body += entry.name + entry.packed
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02",
            (3 << 8) | 20,
            20,
            *entry.fields,
            len(entry.name),
            *(0, 0, 0, 0),
            entry.mode << 16,
            offset,
        )
        directory += entry.name
    count = len(entries)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + end


MANIFEST_MEMBER = ("top/MAR-INF/MANIFEST.json", json.dumps(MANIFEST).encode())


def write_tar(path: Path, members: Sequence[tarfile.TarInfo | tuple[str, bytes]]) -> None:
    """A tar.gz with exactly these members."""
    with tarfile.open(path, "w:gz", compresslevel=1, encoding="utf-8") as archive:
        for given in members:
            if isinstance(given, tarfile.TarInfo):
                archive.addfile(given)
            else:
                member = tarfile.TarInfo(given[0])
                member.size = len(given[1])
                archive.addfile(member, io.BytesIO(given[1]))
