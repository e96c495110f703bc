"""Batchers and gunicorns that cannot be started, because the machine has no more processes or descriptors."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.messages import TemplateFailed
from wsgi_ts.supervisor.batcher_process import BatcherProcess
from wsgi_ts.supervisor.batchers import Batchers
from wsgi_ts.supervisor.child import Owner, SupervisedProcess
from wsgi_ts.supervisor.child_process import Child
from wsgi_ts.supervisor.servers import Server


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, -1)


def test_a_batcher_that_cannot_be_started_is_tried_again(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_ts.supervisor.child.Child", refuse)
    batcher = BatcherProcess(0, "cpu", directory)
    before, threads = open_descriptors(), threading.active_count()
    with pytest.raises(OSError, match="temporarily"):
        batcher.start([1, 2], 1)
    assert (batcher.child, batcher.channel, batcher.segments) == (None, None, set())
    for number in range(6):
        batcher.postpone(100.0)
        assert (batcher.restart_at > 100.0) == (number > 0)
    assert batcher.restart_at < 200.0
    while threading.active_count() > threads:
        threading.Event().wait(0.01)
    assert open_descriptors() == before


def test_a_gunicorn_that_cannot_be_started_is_tried_again(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_ts.supervisor.child.Child", refuse)
    web = Server("gunicorn inference", directory, "wsgi_ts.web")
    before, threads = open_descriptors(), threading.active_count()
    with pytest.raises(OSError, match="temporarily"):
        web.start()
    assert (web.child, web.inbox, web.describe()["starts"]) == (None, -1, 0)
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


class Fake(SupervisedProcess):
    """A process that runs Python code."""

    inbox = -1

    def run_once(self, code: str) -> str:
        """One life; returns how it ended."""
        self._run([sys.executable, "-c", code], [])
        assert self.child is not None
        assert self.child.wait(120) is not None
        return self.died(100.0)


def test_a_child_that_never_works_is_given_up_with_its_last_line(
    directory: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    child = Fake("gunicorn inference", directory)
    broken = "import sys; print('first', file=sys.stderr); raise ValueError('the port is odd')"
    for _ in range(Fake.LIVES - 1):
        assert child.give_up(child.run_once(broken)) is None
        assert child.restart_at < 200.0
    assert child.give_up(child.run_once(broken)) == (
        "gunicorn inference cannot be started: it ended 3 times before it had worked, at last with exit code 1; "
        "its last line: ValueError: the port is odd"
    )
    assert child.restart_at == math.inf
    # All that it said was passed on.
    assert capfd.readouterr().err.count("first\nTraceback") == Fake.LIVES


def test_a_child_that_says_nothing_is_given_up_with_the_way_it_ended(directory: RunDirectory) -> None:
    child = Fake("batcher 0 (cpu)", directory)
    for _ in range(Fake.LIVES):
        said = child.give_up(child.run_once("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert said == (
        "batcher 0 (cpu) cannot be started: it ended 3 times before it had worked, at last with killed by SIGKILL"
    )


def test_a_child_that_worked_under_the_supervisor_before_is_never_given_up(directory: RunDirectory) -> None:
    child = Fake("child", directory)
    child.gives_up = False
    assert {child.give_up("killed by SIGKILL") for _ in range(Fake.LIVES + 2)} == {None}


def test_a_child_that_has_worked_once_is_started_for_ever(
    directory: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    child = Fake("child", directory)
    assert child.give_up("exit code 1") is None
    child.has_worked = True
    assert [child.give_up("exit code 1") for _ in range(20)] == [None] * 20
    # It gets the server's own stderr.
    child.run_once("import os; print(os.fstat(2).st_ino)")
    assert capfd.readouterr().out == f"{os.fstat(2).st_ino}\n"


def test_who_is_silent_for_too_long_is_hung(directory: RunDirectory) -> None:
    batcher = BatcherProcess(0, "cpu", directory)
    looks = []
    for heartbeat in (0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 8, 8, 8, 8, 8, 8, 8):
        batcher.take_heartbeat(heartbeat)
        looks.append(batcher.is_hung())
    # Before its first heartbeat it starts; then five looks at the same one are too many.
    assert looks == [False] * 15 + [True] * 2
    server = Server("gRPC server", directory, "wsgi_ts.rpc", hung_looks=8)
    assert not any(server.is_hung() for _ in range(20))
    server.came_up = True
    assert [server.is_hung() for _ in range(10)] == [False] * 8 + [True] * 2


def test_a_worker_template_that_was_ready_once_ends_no_server(directory: RunDirectory) -> None:
    batchers, failures = Batchers.__new__(Batchers), list[str]()
    batchers._owner = cast(Owner, SimpleNamespace(on_failure=failures.append))
    batcher = BatcherProcess(0, "cpu", directory)
    batchers._take(batcher, TemplateFailed())
    assert len(failures) == 1
    batcher.is_warm = True
    batchers._take(batcher, TemplateFailed())
    assert len(failures) == 1


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


def test_what_a_child_logs_to_stderr_does_not_go_through_the_supervisor(
    directory: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    """A log that is written by the thousand lines must not wait for the supervisor."""
    child = Fake("child", directory)
    assert child.run_once(LOGGING) == "exit code 0"
    assert child.failure("x").endswith("; its last line: said")
    # The two come by two ways, so that one may be in the middle of the other's line.
    printed = capfd.readouterr().err
    assert printed.count("logged") == 1
    assert "said" in printed


def test_a_server_without_a_stderr_starts_children_all_the_same() -> None:
    code = """
import os, sys
from wsgi_ts.supervisor.child_output import StderrRelay
os.close(2)
relay = StderrRelay("child")
sys.exit(0 if relay.server_fds == () and relay.environ == {} else 3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
