"""Lines, files and loggers of one process."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from pathlib import Path

import pytest
from support.logs import logging_to

from wsgi_ts.http.head import parse_head
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.logs.output import BackgroundWriter, LogFile, Output
from wsgi_ts.logs.plan import LogPlan, default_plan
from wsgi_ts.logs.setup import detach_logging, timestamp
from wsgi_ts.logs.text import mask_secrets, safe_target, safe_text

FILES = ["access_log.log", "model_log.log", "model_metrics.log", "ts_log.log", "ts_metrics.log"]


def test_time_is_local_with_milliseconds_after_a_comma() -> None:
    now = time.mktime((2026, 11, 21, 9, 13, 7, 0, 0, -1)) + 0.045
    assert timestamp(now) == "2026-11-21T09:13:07,045"
    assert timestamp(now + 1) == "2026-11-21T09:13:08,045"
    assert timestamp(now, "%H:%M") == "09:13"


def test_lines_have_the_forms_of_torchserve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path) as files:
        files.model.write(["one", "two"], logging.WARNING, "W-9000-m_1.0-stderr")
        files.model_metrics.write(["Time.ms:1.0|#Level:Model"], thread="W-9000-m_1.0-stdout")
        access = AccessLog(files.access)
        access.add("/127.0.0.1:5", "GET /ping?a=b HTTP/1.1", 200, 3)
        access.flush()
        access.flush()
    both = r"(\S{23} \[WARN \] W-9000-m_1\.0-stderr MODEL_LOG - (one|two)\n){2}"
    assert re.fullmatch(both, (tmp_path / "model_log.log").read_text())
    metric = r"\S{23} \[INFO \] W-9000-m_1\.0-stdout MODEL_METRICS - Time\.ms:1\.0\|#Level:Model\n"
    assert re.fullmatch(both + metric, (tmp_path / "ts_log.log").read_text())
    assert (tmp_path / "ts_log.log").read_text() == capfd.readouterr().out
    assert re.fullmatch(r"\S{23} - Time\.ms:1\.0\|#Level:Model\n", (tmp_path / "model_metrics.log").read_text())
    line = r'\S{23} - /127.0.0.1:5 "GET /ping\?a=b HTTP/1.1" 200 3\n'
    assert re.fullmatch(line, (tmp_path / "access_log.log").read_text())


def test_all_five_files_are_made(tmp_path: Path) -> None:
    with logging_to(tmp_path, default_plan(tmp_path / "logs", tmp_path / "metrics")):
        assert sorted(os.listdir(tmp_path / "logs") + os.listdir(tmp_path / "metrics")) == FILES
        assert sorted(os.listdir(tmp_path / "metrics")) == ["model_metrics.log", "ts_metrics.log"]


def test_records_go_to_the_file_and_to_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path):
        try:
            raise ValueError("why\n2026-11-21T00:00:00,000 [INFO ] main x - forged")
        except ValueError:
            logging.getLogger("wsgi_ts.x").exception("what \ud800")
        logging.getLogger("other").debug("not shown")
    text = (tmp_path / "ts_log.log").read_text()
    assert text == capfd.readouterr().out
    first, *rest = text.splitlines()
    assert first.endswith("[ERROR] main wsgi_ts.x - what \\ud800")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: why\\n2026-11-21T00:00:00,000 [INFO ] main x - forged"
    assert "not shown" not in text


def test_lines_name_the_part_of_the_server_and_not_the_module(tmp_path: Path) -> None:
    with logging_to(tmp_path):
        for name in ("wsgi_ts", "wsgi_ts.models.manager", "wsgi_ts_else.a.b", "a.b.c"):
            logging.getLogger(name).warning("x")
        logging.getLogger().handle(logging.makeLogRecord({"name": "made", "msg": "x", "levelno": logging.WARNING}))
    names = [line.rsplit(" ", 3)[1] for line in (tmp_path / "ts_log.log").read_text().splitlines()]
    assert names == ["wsgi_ts", "wsgi_ts.models", "wsgi_ts_else.a.b", "a.b.c", "made"]


def test_a_message_cannot_forge_a_line(tmp_path: Path) -> None:
    with logging_to(tmp_path):
        logging.getLogger("wsgi_ts.x").warning("model %s", "a\r\nb\x1b[2J\x9b1m\u2028\u202ec\td")
    (line,) = (tmp_path / "ts_log.log").read_text().splitlines()
    assert line.endswith("model a\\r\\nb\\x1b[2J\\x9b1m\\u2028\\u202ec\td")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /models?token=abc&x=1", "GET /models?token=***&x=1"),
        ("url=https://me:pw@host/m.mar?X-Amz-Signature=0f&a=b", "url=https://***@host/m.mar?X-Amz-Signature=***&a=b"),
        ("url=https%3A%2F%2Fme%3Apw%40host%2Fm.mar%3FX-Amz-Signature%3D0f%26a%3Db",
         "url=https%3A%2F%2F***@host%2Fm.mar%3FX-Amz-Signature%3D***%26a%3Db"),
        ("http://a@b:c@host/x", "http://***@host/x"),
        ("Authorization: Bearer abc.def, x", "Authorization: Bearer ***, x"),
        ("{'Authorization': 'Basic Zm9v'}", "{'Authorization': 'Basic ***'}"),
        ("https://s3.aws/b/m.mar?X-Amz-Security-Token=a%2Fb&X-Amz-Credential=c",
         "https://s3.aws/b/m.mar?X-Amz-Security-Token=***&X-Amz-Credential=***"),
        ("tokens=3 mytoken=4 a@b http://host/a@b", "tokens=3 mytoken=4 a@b http://host/a@b"),
    ],
)  # fmt: skip
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert mask_secrets(text) == shown
    assert safe_text(text) == shown


def test_masking_takes_time_in_proportion() -> None:
    # Quadratic patterns would need minutes for this.
    for piece in ("http://", "token=", "%3A%2F%2F", "a@", "bearer "):
        mask_secrets(piece * 20_000)


def test_a_request_line_in_the_access_log_is_printable_ascii() -> None:
    assert safe_target("/a?b=%0a") == "/a?b=%0a"
    assert safe_target('/\xc3\xa9"\\ \x85') == "/\\xc3\\xa9\\x22\\x5c\\x20\\x85"
    head = parse_head(b"GET /ping?token=secret&a=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.line == "GET /ping?token=***&a=1 HTTP/1.1"
    assert head.target == "/ping?token=secret&a=1"


def test_a_directory_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    with logging_to(tmp_path, default_plan(tmp_path / "logs", tmp_path / "metrics")) as files:
        logging.getLogger("wsgi_ts.x").warning("goes to stdout alone")
        assert {path.name for path in files.unwritable()} == {"ts_log.log", "access_log.log", "model_log.log"}
        assert (tmp_path / "metrics" / "ts_metrics.log").exists()


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


def test_threads_that_write_while_it_is_reopened_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    file = LogFile(path)
    threads = [threading.Thread(target=lambda: [file.write(b"line\n") for _ in range(2000)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    number = 0
    while any(thread.is_alive() for thread in threads):
        number += 1
        path.rename(tmp_path / f"old.{number}")
        file.reopen()
    for thread in threads:
        thread.join()
    file.close()
    assert b"".join(each.read_bytes() for each in tmp_path.iterdir()) == b"line\n" * 6000


def test_a_full_disk_loses_lines_and_counts_them() -> None:
    file = LogFile(Path("/dev/full"))
    file.write(b"one\ntwo\n")
    assert file.lost == 2
    file.close()


def test_asynchronous_logging_writes_the_same_in_order(tmp_path: Path) -> None:
    plan = default_plan(tmp_path, tmp_path, asynchronous=True)
    with logging_to(tmp_path, plan) as files:
        for number in range(100):
            files.model.write([f"line {number}"])
            logging.getLogger("wsgi_ts.x").info("record %d", number)
    messages = [line.rpartition(" - ")[2] for line in (tmp_path / "ts_log.log").read_text().splitlines()]
    assert messages == [text for number in range(100) for text in (f"line {number}", f"record {number}")]


def test_a_fork_writes_its_own_lines_and_not_those_of_its_parent(tmp_path: Path) -> None:
    with logging_to(tmp_path, default_plan(tmp_path, tmp_path, asynchronous=True)) as files:
        files.model.write(["parent"])
        pid = os.fork()
        if pid == 0:
            from wsgi_ts.logs.output import flush_outputs

            files.model.write(["child"])
            flush_outputs()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    messages = [line.rpartition(" - ")[2] for line in (tmp_path / "model_log.log").read_text().splitlines()]
    assert sorted(messages) == ["child", "parent"]


def test_a_slow_disk_loses_lines_and_holds_up_nobody() -> None:
    class Stuck(Output):
        """A disk that takes nothing until it is let go."""

        def __init__(self) -> None:
            super().__init__(-1)
            self.let_go = threading.Event()
            self.written: list[bytes] = []

        def write_now(self, data: bytes) -> None:
            self.let_go.wait()
            self.written.append(data)

    output, writer = Stuck(), BackgroundWriter(max_waiting_bytes=10)
    for number in range(5):
        writer.put(output, b"abc%d\n" % number)
    assert (writer.lost, output.lost) == (3, 3)
    assert not writer.flush(0.0)
    output.let_go.set()
    writer.stop()
    assert output.written == [b"abc0\n", b"abc1\n"]


def test_a_model_worker_finds_logging_as_in_a_fresh_interpreter(tmp_path: Path) -> None:
    with logging_to(tmp_path):
        detach_logging()
        assert logging.getLogRecordFactory() is logging.LogRecord
        assert logging.getLogger().handlers == []
        assert logging.getLogger().level == logging.WARNING
        logger = logging.getLogger("ACCESS_LOG")
        assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
        logging.getLogger("wsgi_ts.handlers.bundled.base").debug("not for the server's log")
    assert (tmp_path / "ts_log.log").read_text() == ""


def test_a_plan_survives_the_way_to_another_process(tmp_path: Path) -> None:
    plan = default_plan(tmp_path / "logs", tmp_path / "metrics", asynchronous=True)
    plan.write(tmp_path / "plan.json")
    assert LogPlan.read(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o600
