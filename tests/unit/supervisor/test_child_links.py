"""Batchers and gunicorns that cannot be started, because the machine has no more processes or descriptors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.process import Child
from wsgi_ts.supervisor.batcher_process import BatcherLink
from wsgi_ts.supervisor.child_output import FirstLives
from wsgi_ts.supervisor.servers import Gunicorn


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_batcher_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.supervisor.batcher_process.Child", refuse)
    link = BatcherLink(0, "cpu", "wsgi-ts-none")
    before, threads = open_descriptors(), threading.active_count()
    with pytest.raises(OSError, match="temporarily"):
        link.start(tmp_path, tmp_path / "plan", [1, 2], 1)
    assert (link.child, link.channel, link.segments) == (None, None, set())
    for number in range(6):
        link.postpone(100.0)
        assert (link.restart_at > 100.0) == (number > 0)
    assert link.restart_at < 200.0
    while threading.active_count() > threads:
        threading.Event().wait(0.01)
    assert open_descriptors() == before


def test_a_gunicorn_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.supervisor.servers.Child", refuse)
    web = Gunicorn("inference", [], 1)
    before, threads = open_descriptors(), threading.active_count()
    with pytest.raises(OSError, match="temporarily"):
        web.start(tmp_path / "config.json", tmp_path, "wsgi-ts-none")
    assert (web.child, web.ready_fd, web.describe()["starts"]) == (None, -1, 0)
    web.postpone(100.0)
    assert web.restart_at == 100.0
    while threading.active_count() > threads:
        threading.Event().wait(0.01)
    assert open_descriptors() == before


def test_a_child_that_cannot_be_watched_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor left for its pidfd nobody would notice its end."""
    started: list[int] = []

    def no_descriptor(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        Child("sleeper", ["sleep", "60"])
    assert not Path(f"/proc/{started[0]}").exists()


def run_once(lives: FirstLives, code: str) -> str:
    """One life of a child; returns how it ended."""
    relay = lives.relay()
    assert relay is not None
    fds, variables = relay.server_fds, relay.environ
    child = Child("child", [sys.executable, "-c", code], stderr=relay.fd, pass_fds=fds, environ=variables)
    relay.close()
    reason = child.wait(30)
    child.close()
    assert reason is not None
    return reason


def test_a_child_that_never_works_is_given_up_with_its_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    lives = FirstLives("gunicorn inference")
    broken = "import sys; print('first', file=sys.stderr); raise ValueError('the port is odd')"
    for _ in range(FirstLives.ALLOWED - 1):
        assert lives.ended(run_once(lives, broken)) is None
    assert lives.ended(run_once(lives, broken)) == (
        "gunicorn inference cannot be started: it ended 3 times before it had worked, at last with exit code 1; "
        "its last line: ValueError: the port is odd"
    )
    # All that it said was passed on.
    assert capfd.readouterr().err.count("first\nTraceback") == FirstLives.ALLOWED


def test_a_child_that_says_nothing_is_given_up_with_the_way_it_ended() -> None:
    lives = FirstLives("batcher 0 (cpu)")
    for _ in range(FirstLives.ALLOWED):
        said = lives.ended(run_once(lives, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert said == (
        "batcher 0 (cpu) cannot be started: it ended 3 times before it had worked, at last with killed by SIGKILL"
    )


def test_a_child_that_worked_under_the_supervisor_before_is_never_given_up() -> None:
    lives = FirstLives("child")
    lives.gives_up = False
    assert {lives.ended("killed by SIGKILL") for _ in range(FirstLives.ALLOWED + 2)} == {None}


def test_a_child_that_has_worked_once_is_started_for_ever() -> None:
    lives = FirstLives("child")
    assert lives.ended("exit code 1") is None
    lives.has_worked = True
    assert lives.relay() is None
    assert [lives.ended("exit code 1") for _ in range(20)] == [None] * 20


LOGGING = """
import logging, os, subprocess, sys
from wsgi_ts.logs.setup import logged_stderr, setup_logging
from wsgi_ts.logs.plan import LogPlan
handlers = {"c": {"()": "wsgi_ts.logs.setup.ConsoleHandler", "target": "stderr"}}
setup_logging(LogPlan({"version": 1, "handlers": handlers, "root": {"level": "INFO", "handlers": ["c"]}}))
print("said", file=sys.stderr, flush=True)
logging.getLogger("x").error("logged")
assert logged_stderr() > 2 and "WSGI_TS_STDERR_FD" not in os.environ
"""


def test_what_a_child_logs_to_stderr_does_not_go_through_the_supervisor(capfd: pytest.CaptureFixture[str]) -> None:
    """A log that is written by the thousand lines must not wait for the supervisor."""
    lives = FirstLives("child")
    assert run_once(lives, LOGGING) == "exit code 0"
    assert lives.in_words("x").endswith("; its last line: said")
    # The two come by two ways, so that one may be in the middle of the other's line.
    printed = capfd.readouterr().err
    assert printed.count("logged") == 1
    assert "said" in printed


def test_a_server_without_a_stderr_starts_children_all_the_same() -> None:
    code = """
import os, sys
from wsgi_ts.supervisor.child_output import FirstLives
os.close(2)
relay = FirstLives("child").relay()
sys.exit(0 if relay.server_fds == () and relay.environ == {} else 3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
