"""How a worker's output becomes lines, and stays in bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.logs import logging_to

from wsgi_ts.batcher.template.output import (
    LAST_LINES,
    MAX_LINE_BYTES,
    LineSplitter,
    RateLimit,
    WorkerOutput,
)
from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.metrics.reported import ModelMetrics


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]))), st.data())
def test_lines_do_not_depend_on_how_they_are_read(lines: list[str], data: st.DataObject) -> None:
    text = "".join(line + "\n" for line in lines).encode()
    splitter, found = LineSplitter(), []
    while text:
        size = data.draw(st.integers(1, len(text)))
        found += splitter.feed(text[:size])
        text = text[size:]
    assert found + splitter.finish() == lines


@pytest.mark.parametrize("piece_bytes", [1000, 100_000])
def test_a_long_line_is_cut_and_the_next_one_is_whole(piece_bytes: int) -> None:
    text = b"a" * 50_000 + b"\nnext\n"
    splitter = LineSplitter()
    lines = []
    for start in range(0, len(text), piece_bytes):
        lines += splitter.feed(text[start : start + piece_bytes])
    assert lines == ["a" * MAX_LINE_BYTES + " [cut]", "next"]


def test_a_gap_swallows_the_lines_at_its_edges() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"one\ntw") == ["one"]
    splitter.drop(b"o\nthree\nfo")
    assert splitter.feed(b"ur\nfive\n") == ["five"]


def test_control_characters_are_shown_and_not_sent_to_a_terminal() -> None:
    assert LineSplitter().feed(b"\x1b[2J\tx\r\n\xc2\x9b1m\n") == ["\\x1b[2J\tx", "\\x9b1m"]


def test_the_rate_limit_fills_again_with_time() -> None:
    limit = RateLimit(now=0.0, bytes_per_second=100)
    assert limit.allows(100, 0.0)
    assert not limit.allows(1, 0.0)
    assert limit.allows(50, 0.5)
    assert not limit.allows(101, 100.0)


NO_METRICS = ModelMetrics(None, "log", auto_detect=False)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[LogFiles]:
    with logging_to(tmp_path) as files:
        yield files


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def test_only_the_last_lines_are_kept(tmp_path: Path, logs: LogFiles, pipe: tuple[int, int]) -> None:
    output = WorkerOutput("W-9000-probe_1.0", logs, NO_METRICS, now=0.0)
    os.write(pipe[1], b"".join(b"line %d\n" % number for number in range(80)))
    assert output.read(pipe[0], "stdout", 0.0)
    assert output.read(pipe[0], "stdout", 0.0)  # nothing there: not the end
    assert list(output.last_lines) == [f"line {number}" for number in range(80 - LAST_LINES, 80)]
    assert len((tmp_path / "model_log.log").read_text().splitlines()) == 80


def test_what_is_dropped_is_counted(tmp_path: Path, logs: LogFiles, pipe: tuple[int, int]) -> None:
    output = WorkerOutput("W-9000-probe_1.0", logs, NO_METRICS, now=0.0)
    block = b"x" * 999 + b"\n"
    for _ in range(60):
        os.write(pipe[1], block * 50)
        output.read(pipe[0], "stdout", 0.0)
    output.finish()
    assert output.last_lines[-1] == "[2000 lines dropped: more than 1000000 bytes per second]"
    assert len((tmp_path / "model_log.log").read_text().splitlines()) == 1001


def test_a_log_directory_that_cannot_be_written_is_not_an_error(tmp_path: Path, pipe: tuple[int, int]) -> None:
    (tmp_path / "file").touch()
    with logging_to(tmp_path / "file") as unwritable:
        output = WorkerOutput("W-9000-probe_1.0", unwritable, NO_METRICS, now=0.0)
        os.write(pipe[1], b"still read\n")
        assert output.read(pipe[0], "stderr", 0.0)
    assert list(output.last_lines) == ["still read"]
