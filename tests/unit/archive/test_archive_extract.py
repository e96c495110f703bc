"""Unpacking zip and tar.gz archives: all that is refused."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.model_archives import HANDLER, MANIFEST_MEMBER, Place, Raw, mar, raw_zip, write_tar

from wsgi_ts.archive.entries import ArchiveLimits
from wsgi_ts.archive.extract import extract_archive
from wsgi_ts.errors import (
    InternalServerError,
    OutOfResources,
    ServerError,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A fresh place."""
    return Place(tmp_path)


# --- zip: what is refused ----------------------------------------------------------------------------------

BAD_NAMES = [
    "../x",
    "a/../../x",
    "a/..",
    "..\\x",
    "a/..\\..\\x",
    "/../x",
    "a\0b",
    "",
    ".",
    "../models-evil/x",
    "n" * 5000,
    "n" * 256,
    "/".join("d" * 300),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_forbidden_zip_names(place: Place, name: str) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(name.encode())]))
    message = place.refuse("a.mar")
    assert message.startswith("archive entry not allowed: ")
    assert message.isprintable()


@pytest.mark.parametrize("name", ["../x", *(f"top/{name}" for name in BAD_NAMES if "\0" not in name)])
def test_forbidden_tar_names(place: Place, name: str) -> None:
    write_tar(place.store / "a.tar.gz", [(name, b"x")])
    assert place.refuse("a.tar.gz").startswith("archive entry not allowed: ")


def test_name_that_is_not_utf8(place: Place) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"a\xff\xfe")]))
    assert "not UTF-8" in place.refuse("a.mar")
    (place.store / "b.mar").write_bytes(raw_zip([Raw(b"a\xff\xfe", flags=0x800)]))
    assert "not UTF-8" in place.refuse("b.mar")
    write_tar(place.store / "c.tar.gz", [("top/a\udcff", b"x")])
    assert "not UTF-8" in place.refuse("c.tar.gz")


def test_utf8_names_without_the_flag(place: Place) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw("词表.txt".encode())]))
    assert (place.open("a.mar", model_name="m").path / "词表.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (b"a", b"a/b", "both a file and a directory"),
        (b"a/b", b"a", "both a file and a directory"),
        (b"a/", b"a", "both a file and a directory"),
    ],
)
def test_colliding_names(place: Place, first: bytes, second: bytes, why: str) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(first), Raw(second)]))
    assert why in place.refuse("a.mar")


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (stat.S_IFLNK | 0o777, "a link out of the model directory"),
        (stat.S_IFIFO | 0o600, "not a regular file"),
        (stat.S_IFCHR | 0o600, "not a regular file"),
    ],
)
def test_zip_entries_that_are_no_plain_files(place: Place, mode: int, why: str) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"link", b"/etc/passwd", mode=mode)]))
    assert why in place.refuse("a.mar")


def test_executable_bit_is_the_only_one_kept(place: Place) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"run.sh", mode=stat.S_IFREG | 0o6777)]))
    opened = place.open("a.mar", model_name="m")
    assert stat.S_IMODE((opened.path / "run.sh").stat().st_mode) == 0o700


def test_encrypted_and_unknown_methods(place: Place) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"a", flags=1)]))
    assert "encrypted" in place.refuse("a.mar")
    for method in (1, 12, 14, 99):
        (place.store / "b.mar").write_bytes(raw_zip([Raw(b"a", method=method)]))
        assert f"compression method {method}" in place.refuse("b.mar")


def test_overlapping_entries(place: Place) -> None:
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"a"), Raw(b"b", share_previous=True)]))
    assert "overlaps another entry" in place.refuse("a.mar")
    (place.store / "b.mar").write_bytes(raw_zip([Raw(b"a", packed_size=10_000), Raw(b"b")]))
    assert "overlaps another entry" in place.refuse("b.mar")


def test_lying_sizes_and_checksums(place: Place) -> None:
    content = b"0123456789" * 100
    for raw in (Raw(b"a", content, size=10), Raw(b"a", content, size=5000), Raw(b"a", content, crc=1)):
        (place.store / "a.mar").write_bytes(raw_zip([Raw(b"ok"), raw]))
        message = place.refuse("a.mar")
        assert message.startswith(("Model archive is damaged", "archive entry not allowed"))


def test_too_many_entries(place: Place) -> None:
    limits = ArchiveLimits(max_entries=20)
    mar(place.store / "a.mar", {f"f{i}": b"" for i in range(21)})
    assert place.refuse("a.mar", limits=limits) == "Model archive has more than 20 entries."
    mar(place.store / "b.mar", {"/".join("abcdefghijk"[:depth]) + "/file": b"" for depth in (5, 9)})
    mar(place.store / "c.mar", {"/".join(f"{i}{d}" for d in range(11)) + "/f": b"" for i in range(2)})
    assert place.open("b.mar", limits=limits).extracted
    assert place.refuse("c.mar", limits=limits) == "Model archive has more than 20 entries."


def test_a_million_entries_are_not_read_into_memory(place: Place) -> None:
    directory = b"PK\x01\x02" + b"\0" * 42
    count = 1_000_000
    body = directory * count
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(body), 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(body), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (place.store / "a.mar").write_bytes(b"PK\x03\x04" + body + record + locator + end)
    assert place.refuse("a.mar") == "Model archive has more than 10000 entries."
    lying = end[:8] + struct.pack("<HHIIH", 3, 3, len(body) & 0xFFFFFFFF, 4, 0)
    (place.store / "b.mar").write_bytes(b"PK\x03\x04" + body + lying)
    assert place.refuse("b.mar") == "Model archive has more than 10000 entries."


def test_size_and_ratio(place: Place) -> None:
    mar(place.store / "a.mar", {"zeros": bytes(3_000_000), "f": b""})
    limits = ArchiveLimits(max_archive_bytes=2_999_999)
    assert "too large: more than 2999999 bytes" in place.refuse("a.mar", limits=limits)
    bomb = ArchiveLimits(ratio_floor_bytes=1_000_000)
    assert "more than 200 times its size" in place.refuse("a.mar", limits=bomb)
    assert place.open("a.mar").extracted
    mar(place.store / "b.mar", {"zeros": bytes(3_000_000)}, method=zipfile.ZIP_STORED)
    assert place.open("b.mar", limits=bomb).extracted
    write_tar(place.store / "c.tar.gz", [("top/zeros", bytes(3_000_000)), MANIFEST_MEMBER])
    assert "too large" in place.refuse("c.tar.gz", limits=limits)
    assert "more than 200 times its size" in place.refuse("c.tar.gz", limits=bomb)


def test_bytes_are_counted_although_the_header_lies(place: Place) -> None:
    """The header says 10 bytes; what is unpacked never goes past the limit."""
    (place.store / "a.mar").write_bytes(raw_zip([Raw(b"a", bytes(5_000_000), size=10)]))
    place.refuse("a.mar", limits=ArchiveLimits(max_archive_bytes=1000))


def test_full_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mar(place.store / "a.mar")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("wsgi_ts.archive.entries.shutil.disk_usage", lambda path: usage)
    assert place.refuse("a.mar", OutOfResources) == "Not enough disk space to extract the model archive."
    monkeypatch.undo()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wsgi_ts.archive.entries._write_all", full)
    assert place.refuse("a.mar", OutOfResources) == "Not enough disk space to extract the model archive."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Model archive is empty (0 bytes)."),
        (b"nonsense", "Model archive is neither zip nor tar.gz."),
        (b"\n<html>", "Model archive is neither zip nor tar.gz: it looks like an HTML page."),
        (b"PK\x03\x04", "Model archive is damaged: it is truncated (no end record)."),
        (
            b"\x1f\x8bxxxx",
            "Model archive is damaged: it is truncated, fails its checksum or is no tar archive.",
        ),
    ],
)
def test_not_an_archive(place: Place, content: bytes, message: str) -> None:
    (place.store / "a.mar").write_bytes(content)
    assert place.refuse("a.mar") == message


@pytest.mark.parametrize("kind", ["a.mar", "a.tar.gz"])
def test_every_truncation_and_appendix_is_noticed(place: Place, kind: str) -> None:
    path = place.store / kind
    if kind == "a.mar":
        mar(path)
    else:
        write_tar(path, [("top/h.py", HANDLER), MANIFEST_MEMBER])
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        place.refuse(kind)
    path.write_bytes(whole + b"more")
    assert "damaged" in place.refuse(kind)
    path.write_bytes(whole)
    assert place.open(kind).manifest.model_name == "probe"


def test_zip_behind_a_prefix(place: Place) -> None:
    content = mar(place.store / "a.mar").read_bytes()
    (place.store / "a.mar").write_bytes(content[:4] + b"prefix" + content)
    assert "damaged" in place.refuse("a.mar")


def test_unreadable_archive(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mar(place.store / "a.mar")

    def broken(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("wsgi_ts.archive.model_directory.extract_archive", broken)
    assert place.refuse("a.mar", InternalServerError) == "Failed to save model: a.mar"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_escape(tmp_path: Path, data: st.DataObject) -> None:
    """Any change of bytes ends in a clean refusal or in files inside the directory."""
    source, target = tmp_path / "x.mar", tmp_path / "out"
    if data.draw(st.booleans()):
        content = raw_zip([Raw(b"a"), Raw(b"dir/b", b"text" * 50), Raw(b"MAR-INF/MANIFEST.json", b"{}")])
    else:
        write_tar(source, [("top/a", b"x" * 600), ("top/d/b", b"y")])
        content = gzip.decompress(source.read_bytes())
    changed = bytearray(content)
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        changed[at] = value
    source.write_bytes(bytes(changed) if changed[:2] == b"PK" else gzip.compress(bytes(changed), 1))
    before = set(tmp_path.iterdir())
    try:
        extract_archive(source, target, ArchiveLimits(max_archive_bytes=100_000))
    except ServerError:
        assert set(tmp_path.iterdir()) <= before | {source}
    else:
        for path in target.rglob("*"):
            assert path.is_file() or path.is_dir() or path.is_symlink()
            assert Path(os.path.realpath(path)).is_relative_to(target)
        shutil.rmtree(target)


# --- tar: what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "a link out of the model directory"),
        (tarfile.LNKTYPE, "leaves the model directory"),
        (tarfile.CHRTYPE, "not a regular file"),
        (tarfile.BLKTYPE, "not a regular file"),
        (tarfile.FIFOTYPE, "not a regular file"),
        (b"Z", "not a regular file"),
    ],
)
def test_tar_members_that_are_no_plain_files(place: Place, kind: bytes, why: str) -> None:
    member = tarfile.TarInfo("top/x")
    member.type = kind
    member.linkname = "../../../etc/passwd"
    write_tar(place.store / "a.tar.gz", [member])
    assert why in place.refuse("a.tar.gz")


def test_setuid_bits_are_not_taken_over(place: Place) -> None:
    member = tarfile.TarInfo("top/x")
    member.mode = 0o6755
    write_tar(place.store / "a.tar.gz", [member, MANIFEST_MEMBER])
    assert stat.S_IMODE((place.open("a.tar.gz").path / "x").stat().st_mode) == 0o700


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A member of a tar that is a link."""
    member = tarfile.TarInfo(f"top/{name}")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "members",
    [
        [link("a", "/etc/passwd")],
        [link("a", "../../x")],
        [link("a", "sub/../../x")],
        # Each of them stays inside by its own text; together they lead out.
        [link("d/e/up", "../.."), link("out", "d/e/up/../x")],
        [link("a", "top/nothere", tarfile.LNKTYPE)],
        [link("a", "top/a", tarfile.LNKTYPE)],
        [link("b", "a"), link("a", "top/b", tarfile.LNKTYPE)],
        [link("d", "."), ("top/d/h.py", b"x")],
    ],
)
def test_links_that_are_refused(place: Place, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> None:
    write_tar(place.store / "a.tar.gz", [*members, MANIFEST_MEMBER])
    assert place.refuse("a.tar.gz").startswith("archive entry not allowed: ")


def test_tar_made_from_the_current_directory(place: Place) -> None:
    root, code = tarfile.TarInfo("."), tarfile.TarInfo("./code")
    root.type = code.type = tarfile.DIRTYPE
    write_tar(place.store / "a.tar.gz", [root, code, ("./code/h.py", HANDLER), ("./model.pth", b"w")])
    opened = place.open("a.tar.gz", model_name="m")
    assert (opened.path / "code" / "h.py").is_file() and (opened.path / "model.pth").is_file()


def test_tar_stripping_cannot_make_two_of_one(place: Place) -> None:
    write_tar(place.store / "a.tar.gz", [("a/x", b"1"), ("b/x", b"2")])
    assert "b/x (unpacked it would be the same file as a/x)" in place.refuse("a.tar.gz")


def test_tar_header_that_claims_gigabytes(place: Place) -> None:
    header = tarfile.TarInfo("top/pax")
    header.type = tarfile.XHDTYPE
    header.size = 8 << 30
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    (place.store / "a.tar.gz").write_bytes(gzip.compress(content))
    assert "damaged" in place.refuse("a.tar.gz")


def test_chain_of_long_names(place: Place) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 512
    content = (header.tobuf(tarfile.GNU_FORMAT) + b"n" * 512) * 5000
    (place.store / "a.tar.gz").write_bytes(gzip.compress(content))
    assert "damaged" in place.refuse("a.tar.gz")


def test_tar_with_a_wrong_header_in_the_middle(place: Place) -> None:
    write_tar(place.store / "a.tar.gz", [("top/a", b"x"), ("top/b", b"y")])
    content = bytearray(gzip.decompress((place.store / "a.tar.gz").read_bytes()))
    content[1024 + 150] ^= 1
    (place.store / "a.tar.gz").write_bytes(gzip.compress(bytes(content)))
    assert "damaged" in place.refuse("a.tar.gz")


def test_large_members_are_read_once(place: Place) -> None:
    """Members whose ends fall on every kind of block boundary; a step back would make gzip start over."""
    sizes = [0, 1, 511, 512, 513, 8192, 131072, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
    files = [(f"top/f{size}", os.urandom(size)) for size in sizes]
    write_tar(place.store / "a.tar.gz", files)
    opened = place.open("a.tar.gz", model_name="m")
    for name, content in files:
        assert (opened.path / name.removeprefix("top/")).read_bytes() == content
