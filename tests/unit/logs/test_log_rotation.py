"""Rotation: when, into which names, and without losing a line of any process."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.eventually import eventually

from wsgi_ts.logs.output import LogFile
from wsgi_ts.logs.rotation import LogRotation, Rotation

NOON = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))
DAY_S = 86400.0


def rotation(folder: Path, **changes: object) -> Rotation:
    rows = {"max_bytes": 0, "period": "", "keep": 5, "archive": f"{folder}/a.%d-%b.log.gz", **changes}
    return Rotation(**rows)  # type: ignore[arg-type]


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


class Place:
    """One file with a writer, and its rotation with a clock of the test's."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder = folder
        self.file = LogFile(folder / "a.log")
        self.asked = 0
        self.obeys = True
        self.rotation = LogRotation({self.file.path: rotation(folder, **changes)}, {}, self.reopen)

    def reopen(self) -> None:
        self.asked += 1
        if self.obeys:
            self.file.reopen()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "size", "later_s", "due"),
    [
        ({"max_bytes": 10}, 9, 0, False),
        ({"max_bytes": 10}, 10, 0, True),
        ({"period": "day"}, 1, 3600, False),
        ({"period": "day"}, 1, DAY_S, True),
        ({"period": "day"}, 0, DAY_S, False),
        ({"period": "hour"}, 1, 3600, True),
        ({}, 1 << 40, 100 * DAY_S, False),
    ],
)
def test_when_a_file_is_due(tmp_path: Path, changes: dict[str, object], size: int, later_s: float, due: bool) -> None:
    assert rotation(tmp_path, **changes).is_due(size, NOON, NOON + later_s) == due


def test_a_file_gets_the_day_it_was_begun_on_and_a_number_where_that_is_taken(tmp_path: Path) -> None:
    place = Place(tmp_path, period="day")
    for day in range(2):
        place.rotation.look(NOON + day * DAY_S)
        place.file.write(b"line of day %d\n" % day)
    place.rotation.look(NOON + DAY_S)
    assert place.names() == ["a.21-Nov.log.gz", "a.log"]
    assert unpacked(tmp_path / "a.21-Nov.log.gz") == b"line of day 0\n"
    assert place.file.path.read_bytes() == b"line of day 1\n"
    place.file.close()
    by_size = Place(tmp_path, max_bytes=1)
    for number in range(2):
        by_size.file.write(b"%d\n" % number)
        by_size.rotation.look(NOON)
        by_size.rotation.look(NOON)
    assert by_size.names() == ["a.21-Nov.1.log.gz", "a.21-Nov.2.log.gz", "a.21-Nov.log.gz", "a.log"]


def test_only_the_newest_are_kept_and_strangers_stay(tmp_path: Path) -> None:
    strangers = ["a.notes.log.gz", "b.01-Nov.log.gz", "a.21-Nov.txt"]
    for name in strangers:
        (tmp_path / name).touch()
    place = Place(tmp_path, max_bytes=1, keep=2)
    for number in range(5):
        place.file.write(b"%d\n" % number)
        os.utime(place.file.path, (NOON + number, NOON + number))
        place.rotation.look(NOON)
    names = set(place.names()) - set(strangers) - {"a.log"}
    assert {unpacked(tmp_path / name) for name in names} == {b"3\n", b"4\n"}
    assert set(strangers) <= set(place.names())


def test_nothing_is_compressed_while_somebody_writes_to_it(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=1)
    place.obeys = False
    place.file.write(b"one\n")
    place.rotation.look(NOON)
    place.file.write(b"two\n")
    place.rotation.look(NOON + 1)
    assert (place.names(), place.asked) == (["a.21-Nov.log"], 1)
    place.obeys = True
    place.rotation.look(NOON + 6)  # who has not done it is asked again
    assert place.asked == 2
    place.rotation.look(NOON + 7)
    assert unpacked(tmp_path / "a.21-Nov.log.gz") == b"one\ntwo\n"
    assert not (tmp_path / "a.21-Nov.log").exists()


def test_a_reader_does_not_count_as_writer(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=1)
    place.file.write(b"one\n")
    with place.file.path.open():
        place.rotation.look(NOON)
        assert "a.21-Nov.log.gz" in place.names()


def test_what_an_earlier_instance_left_uncompressed_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.20-Nov.log").write_text("left\n")
    place = Place(tmp_path)
    place.rotation.start()
    try:
        eventually((tmp_path / "a.20-Nov.log.gz").exists, within=10)
    finally:
        place.rotation.stop()
    assert not (tmp_path / "a.20-Nov.log").exists()


def test_a_folder_that_cannot_be_written_is_left_alone_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = Place(tmp_path, max_bytes=1, archive=f"{tmp_path}/file/a.%d-%b.log.gz")
    place.file.write(b"one\n")
    place.rotation.look(NOON)
    assert (place.asked, place.file.path.read_bytes()) == (0, b"one\n")
    (tmp_path / "file").unlink()
    place.rotation.look(NOON + 1)
    assert place.asked == 0
    place.rotation.look(NOON + 61)
    assert place.asked == 1


WRITER = """
import signal, sys, time
from pathlib import Path
from wsgi_ts.logs.output import LogFile
file = LogFile(Path(sys.argv[1]))
signal.signal(signal.SIGUSR1, lambda *_: file.reopen())
print("up", flush=True)
for number in range(3000):
    # There is something to rotate in each third of the lines, however seldom the owner comes to look.
    while len(list(Path(sys.argv[1]).parent.glob("*.gz"))) < number // 1000:
        time.sleep(0.01)
    file.write(f"{sys.argv[2]} {number} {'x' * 80}\\n".encode())
    time.sleep(0.0002)
"""


def test_many_processes_write_and_no_line_is_lost_or_mixed(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(log), str(number)], stdout=subprocess.PIPE)
        for number in range(3)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"up\n"

        def tell_all() -> None:
            for writer in writers:
                if writer.poll() is None:
                    writer.send_signal(signal.SIGUSR1)

        owner = LogRotation({log: rotation(tmp_path, max_bytes=50_000, keep=0)}, {}, tell_all)
        now = NOON
        while any(writer.poll() is None for writer in writers):
            now += 6
            owner.look(now)
        for turn in range(3):
            owner.look(now + 6 * (turn + 1))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    archives = [path for path in tmp_path.iterdir() if path.suffix == ".gz"]
    assert len(archives) >= 3
    text = b"".join(map(unpacked, archives))
    text += b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".gz")
    expected = {f"{writer} {number} {'x' * 80}".encode() for writer in range(3) for number in range(3000)}
    lines = text.splitlines()
    assert len(lines) == 9000
    assert set(lines) == expected
