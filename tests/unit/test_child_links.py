"""Batchers and gunicorns that cannot be started, because the machine has no more processes or descriptors."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.batcher_link import BatcherLink
from wsgi_ts.child_output import FirstLives
from wsgi_ts.process import Child
from wsgi_ts.web_tier import Gunicorn


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_batcher_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.batcher_link.Child", refuse)
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
    monkeypatch.setattr("wsgi_ts.web_tier.Child", refuse)
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
    child = Child("child", [sys.executable, "-c", code], stderr=None if relay is None else relay.fd)
    if relay is not None:
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


def test_a_child_that_has_worked_once_is_started_for_ever() -> None:
    lives = FirstLives("child")
    assert lives.ended("exit code 1") is None
    lives.has_worked = True
    assert lives.relay() is None
    assert [lives.ended("exit code 1") for _ in range(20)] == [None] * 20
