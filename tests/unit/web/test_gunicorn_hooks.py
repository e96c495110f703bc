"""Hooks of a user's gunicorn_config: what raises, ends the process or hangs costs the hook, nothing else."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.plugins.report import PluginReport
from wsgi_ts.web import gunicorn_config

HOOKS = """
import signal, sys, time

def when_ready(server):
    while True:
        pass

def pre_fork(server, worker):
    time.sleep(1000)

def on_exit(server):
    sys.exit(1)

def on_starting(server):
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    server.append("started")
"""


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(gunicorn_config, "HOOK_LIMIT_S", 2)
    (tmp_path / "gunicorn.conf.py").write_text(HOOKS)
    return gunicorn_config.read_gunicorn_config(tmp_path / "gunicorn.conf.py", PluginReport(tmp_path, "test"))


def test_one_that_hangs_is_ended_and_reported(hooks: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGALRM)
    hooks["when_ready"](None)
    hooks["pre_fork"](None, None)
    hooks["on_exit"](None)
    assert [record.getMessage() for record in caplog.records] == [
        "Plugin gunicorn_config: when_ready has not ended within 2 s; gunicorn goes on without its when_ready",
        "Plugin gunicorn_config: pre_fork has not ended within 2 s; gunicorn goes on without its pre_fork",
        "Plugin gunicorn_config: SystemExit: 1; gunicorn goes on without its on_exit",
    ]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_one_that_ends_does_what_it_likes(hooks: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    started: list[str] = []
    try:
        hooks["on_starting"](started)
        assert started == ["started"]
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)
