from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsgi_ts.log import LogFile, access_message, plain_line, setup_logging, timestamp, ts_line

FILES = ["access_log.log", "model_log.log", "model_metrics.log", "ts_log.log", "ts_metrics.log"]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    raising = logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.getLogger("wsgi_ts").setLevel(logging.NOTSET)


def test_time_is_local_with_milliseconds_after_a_comma() -> None:
    now = time.mktime((2026, 11, 21, 9, 13, 7, 0, 0, -1)) + 0.045
    assert timestamp(now) == "2026-11-21T09:13:07,045"
    assert timestamp(now + 1) == "2026-11-21T09:13:08,045"


def test_lines_have_the_forms_of_torchserve() -> None:
    assert re.fullmatch(
        r"\S{23} \[WARN \] W-9000-m_1.0 MODEL_LOG - text\n", ts_line("WARN", "W-9000-m_1.0", "MODEL_LOG", "text")
    )
    message = access_message("/127.0.0.1:5", "GET", "/ping?a=b", "HTTP/1.1", status=200, duration_ms=3)
    assert re.fullmatch(r'\S{23} - /127.0.0.1:5 "GET /ping\?a=b HTTP/1.1" 200 3\n', plain_line(message))


def test_all_five_files_are_made(tmp_path: Path) -> None:
    setup_logging(tmp_path / "logs", tmp_path / "metrics")
    assert sorted(os.listdir(tmp_path / "logs") + os.listdir(tmp_path / "metrics")) == FILES


def test_records_go_to_the_file_and_to_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, tmp_path)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("wsgi_ts.x").exception("what \ud800")
    logging.getLogger("other").debug("not shown")
    text = (tmp_path / "ts_log.log").read_text()
    assert text == capfd.readouterr().out
    first, *rest = text.splitlines()
    assert first.endswith("[ERROR] main wsgi_ts.x - what \\ud800")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: why"
    assert "not shown" not in text


def test_a_directory_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    files = setup_logging(tmp_path / "logs", tmp_path / "metrics")
    logging.getLogger("wsgi_ts.x").warning("goes to stdout alone")
    assert [path.name for path in files.unwritable()] == ["ts_log.log", "access_log.log", "model_log.log"]
    assert files.ts_metrics.is_open


def test_reopen_follows_a_rotation(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log")
    file.write(b"one\n")
    (tmp_path / "a.log").rename(tmp_path / "a.log.1")
    file.write(b"two\n")
    file.reopen()
    file.write(b"three\n")
    file.close()
    file.write(b"nowhere\n")
    assert (tmp_path / "a.log.1").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "a.log").read_bytes() == b"three\n"


def test_a_full_disk_loses_lines_and_counts_them() -> None:
    file = LogFile(Path("/dev/full"))
    file.write(b"one\ntwo\n")
    assert file.lost == 2
    file.close()
