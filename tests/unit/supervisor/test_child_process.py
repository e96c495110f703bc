"""A child has a session of its own, tells why it ended, and dies with its parent."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from support.processes import python

from wsgi_ts.process import PARENT_PID_VARIABLE, ProcessIdentity, wait_until_gone
from wsgi_ts.supervisor.child_process import Child


def test_child_tells_why_it_ended(children: list[Child]) -> None:
    child = Child("a child", python("raise SystemExit(3)"))
    children.append(child)
    assert child.wait(60.0) == "exit code 3"
    assert child.poll() == "exit code 3"


def test_what_does_not_listen_can_be_killed(children: list[Child]) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    read, write = os.pipe()
    child = Child("deaf", python(f"import os; os.dup2({write}, 1); {deaf}"), pass_fds=[write])
    children.append(child)
    os.close(write)
    assert os.read(read, 1) == b"x"
    child.send_signal(signal.SIGTERM)
    assert child.wait(0.2) is None
    child.send_signal(signal.SIGKILL)
    assert child.wait(60.0) == "killed by SIGKILL"
    os.close(read)


def test_child_has_its_own_session_and_no_supervisor_variables(
    children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    read, write = os.pipe()
    code = (
        f"import os; os.write({write}, repr((os.getsid(0) == os.getpid(), 'NOTIFY_SOCKET' in os.environ, "
        f"os.environ['{PARENT_PID_VARIABLE}'], os.environ['X'])).encode())"
    )
    child = Child("looks around", python(code), pass_fds=[write], environ={"X": "y"})
    children.append(child)
    os.close(write)
    child.wait(60.0)
    assert os.read(read, 1000).decode() == repr((True, False, str(os.getpid()), "y"))
    os.close(read)


def test_child_dies_with_a_killed_parent() -> None:
    # A parent of its own, which starts a child and is then killed.
    parent_code = (
        "import sys, time\n"
        "from wsgi_ts.supervisor.child_process import Child\n"
        "code = 'from wsgi_ts.process import die_with_parent; die_with_parent(); print(1, flush=True);'\n"
        "code += 'import time; time.sleep(60)'\n"
        "child = Child('c', [sys.executable, '-c', code])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(python(parent_code), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as output:
        lines = sorted([output.readline(), output.readline()], key=len)
    assert lines[0] == "1\n"
    child = ProcessIdentity.of(int(lines[1]))
    assert child is not None
    parent.kill()
    parent.wait()
    assert wait_until_gone([child], 60.0) == []
