"""Model archives that no torch-model-archiver made, and what has to be in the model's folder."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANDLER = b"def handle(data, context):\n    return None if data is None else [row.get('body', b'') for row in data]\n"
#: Raises where it is imported: an older file that a newer one takes the place of.
OLD_HANDLER = b"raise ImportError('the older handler')\n"
MANIFEST_NAME = "MAR-INF/MANIFEST.json"
#: What most of the archives hold.
FILES = frozenset({MANIFEST_NAME, "handler.py", "data/words.txt"})
Entries = list[tuple[str, bytes]]


def manifest(handler: str = "handler.py:handle", **model: object) -> bytes:
    """A manifest; its model has the name that the server is asked for."""
    entry = {"modelName": "m", "modelVersion": "1.0", "handler": handler, **model}
    return json.dumps({"runtime": "python", "model": entry}).encode()


def entries(spell: Callable[[str], str] = str) -> Entries:
    """The usual files, each name as `spell` writes it."""
    contents = {MANIFEST_NAME: manifest(), "handler.py": HANDLER, "data/words.txt": b"a b"}
    return [(spell(name), content) for name, content in contents.items()]


@dataclass(frozen=True)
class UsersArchive:
    """One archive or folder.

    Attributes:
        name: says what is special; with its suffix it is the name in the model store.
        build: makes it at a path.
        files: what has to be in the model's folder, at least.
    """

    name: str
    build: Callable[[Path], None]
    files: frozenset[str] = FILES


def zipped(found: Entries, *, modes: dict[str, int] | None = None, system: int = 3) -> Callable[[Path], None]:
    """A zip with exactly these names; a mode is that of the file, its kind included."""

    def build(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in found:
                # The module warns of a name that comes twice, which is meant here.
                archive.NameToInfo.pop(name, None)
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.create_system = system
                info.external_attr = (modes or {}).get(name, 0) << 16
                archive.writestr(info, content)

    return build


def streamed(found: Entries) -> Callable[[Path], None]:
    """A zip as it comes out of a pipe: sizes stand behind the data."""

    class Pipe(io.RawIOBase):
        """A file that cannot be positioned."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.file = path.open("wb")

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            return self.file.write(data)  # type: ignore[call-overload, no-any-return]

        def close(self) -> None:
            self.file.close()
            super().close()

    def build(path: Path) -> None:
        with Pipe(path) as pipe, zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in found:
                archive.writestr(name, content)

    return build


def tarred(
    found: Entries, *members: tarfile.TarInfo, pax_headers: dict[str, str] | None = None
) -> Callable[[Path], None]:
    """A tar.gz with exactly these names, and further members behind them."""

    def build(path: Path) -> None:
        with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers=pax_headers, compresslevel=1) as archive:
            for name, content in found:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                member.type = tarfile.DIRTYPE if name.endswith("/") or name == "." else tarfile.REGTYPE
                archive.addfile(member, io.BytesIO(content))
            for member in members:
                archive.addfile(member)

    return build


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A member that is a link, symbolic or hard."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def folder(found: Entries, links: dict[str, str] | None = None) -> Callable[[Path], None]:
    """A folder with these files and links."""

    def build(path: Path) -> None:
        for name, content in found:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        for name, target in (links or {}).items():
            (path / name).symlink_to(target)

    return build


_WITH_LINK = FILES | {"link.py"}
_LINK = stat.S_IFLNK | 0o777
_MACOS: Entries = [("__MACOSX/._handler.py", b"\0\5\x16\7"), (".DS_Store", b"\0\0\0\1Bud1"), ("Icon\r", b"")]
_SUBFOLDER: Entries = [
    (MANIFEST_NAME, manifest("src/handler.py:handle")),
    ("src/handler.py", b"from near import handle\n"),
    ("src/near.py", HANDLER),
]

ARCHIVES = [
    UsersArchive("dot-slash.mar", zipped([("./", b""), *entries("./{}".format)])),
    UsersArchive("dots-inside.mar", zipped(entries(lambda name: name.replace("/", "/./")))),
    UsersArchive("up-and-down.mar", zipped(entries("tmp/../{}".format))),
    UsersArchive("doubled-slashes.mar", zipped(entries(lambda name: f".//{name.replace('/', '//')}"))),
    UsersArchive("absolute-names.mar", zipped(entries("/{}".format))),
    UsersArchive("directory-entries.mar", zipped([("data/", b""), ("MAR-INF/", b""), ("data/", b""), *entries()])),
    UsersArchive(
        "backslashes.mar", zipped([("data\\", b""), *entries(lambda name: name.replace("/", "\\"))], system=0)
    ),
    UsersArchive("drive-letter.mar", zipped([*entries(), ("C:/build/notes.txt", b"x")])),
    UsersArchive("from-macos.mar", zipped([*entries(), *_MACOS])),
    UsersArchive("one-top-folder.mar", zipped([("model/", b""), *entries("model/{}".format)])),
    UsersArchive("top-folder-from-macos.mar", zipped([*entries("model/{}".format), *_MACOS[:2]])),
    UsersArchive("newer-file-appended.mar", zipped([("handler.py", OLD_HANDLER), *entries()])),
    UsersArchive("same-file-by-two-spellings.mar", zipped([("./handler.py", OLD_HANDLER), *entries()])),
    UsersArchive(
        "names-that-differ-by-case.mar",
        zipped([*entries(), ("README", b"1"), ("readme", b"2")]),
        FILES | {"README", "readme"},
    ),
    UsersArchive(
        "link-inside.mar", zipped([*entries(), ("link.py", b"./handler.py")], modes={"link.py": _LINK}), _WITH_LINK
    ),
    UsersArchive("shared-folder-modes.mar", zipped(entries(), modes={"handler.py": stat.S_IFREG | 0o2775})),
    UsersArchive("from-a-pipe.mar", streamed(entries())),
    UsersArchive("named-zip.zip", zipped(entries())),
    UsersArchive(
        "handler-in-a-folder.mar", zipped(_SUBFOLDER), frozenset({MANIFEST_NAME, "src/handler.py", "src/near.py"})
    ),
    UsersArchive("tar-named-mar.mar", tarred(entries("top/{}".format))),
    UsersArchive("tar-of-a-folder.tar.gz", tarred([("top/", b""), *entries("top/{}".format)])),
    UsersArchive("tar-of-dot.tar.gz", tarred([(".", b""), ("./data/", b""), *entries("./{}".format)])),
    UsersArchive("tar-of-dot-slash-folder.tgz", tarred(entries("./model/{}".format))),
    UsersArchive("tar-absolute.tar.gz", tarred(entries("/{}".format))),
    UsersArchive("tar-dots-inside.tar.gz", tarred(entries("top/.//{}".format))),
    UsersArchive("tar-by-git.tar.gz", tarred(entries("top/{}".format), pax_headers={"comment": "c0ffee"})),
    UsersArchive("tar-from-macos.tar.gz", tarred([*entries("top/{}".format), ("top/._handler.py", b"\0\5\x16\7")])),
    UsersArchive(
        "tar-with-links.tar.gz",
        tarred(
            entries("top/{}".format),
            link("top/link.py", "handler.py"),
            link("top/w", "top/data/words.txt", tarfile.LNKTYPE),
        ),
        _WITH_LINK | {"w"},
    ),
    UsersArchive(
        "tar-appended.tar.gz",
        tarred([("top/handler.py", OLD_HANDLER), *entries("top/{}".format), ("top/handler.py", HANDLER)]),
    ),
    UsersArchive("folder", folder(entries())),
    UsersArchive("folder-in-a-folder", folder(entries("inner/{}".format))),
    UsersArchive("folder-in-a-folder-from-macos", folder([*entries("inner/{}".format), (".DS_Store", b"Bud1")])),
    UsersArchive("folder-with-links", folder(entries(), {"link.py": "/etc/hosts"}), _WITH_LINK),
]
