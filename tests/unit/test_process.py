from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.eventually import eventually
from support.processes import python

from wsgi_ts.process import (
    INSTANCE_VARIABLE,
    PARENT_PID_VARIABLE,
    ProcessIdentity,
    command_line,
    exit_reason,
    processes_of_instance,
    python_command,
    start_time,
    wait_until_gone,
)
from wsgi_ts.supervisor.child_process import Child

SLEEP = "import time; time.sleep(60)"


def test_exit_reasons_are_words() -> None:
    assert exit_reason(0) == "exit code 0"
    assert exit_reason(3) == "exit code 3"
    assert exit_reason(-11) == "killed by SIGSEGV"
    assert exit_reason(-63) == "killed by signal 63"


def test_child_that_finds_its_parent_gone_leaves() -> None:
    environ = {**os.environ, PARENT_PID_VARIABLE: "1"}
    code = "from wsgi_ts.process import die_with_parent; die_with_parent(); print('alive')"
    answer = subprocess.run(python(code), check=False, env=environ, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (1, "")


def test_identity_is_not_that_of_another_process_with_the_same_pid(children: list[Child]) -> None:
    child = Child("sleeps", python(SLEEP))
    children.append(child)
    assert child.identity.is_alive()
    stranger = ProcessIdentity(child.pid, child.identity.start_time - 1)
    assert not stranger.is_alive()
    stranger.kill()
    assert child.wait(0.2) is None
    child.identity.kill()
    assert child.wait(60.0) == "killed by SIGKILL"
    assert not child.identity.is_alive()


def test_the_arguments_of_a_process_that_becomes_another_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of its old program and its new one's arguments a process has none, and is no stranger."""
    process = tmp_path / "77"
    process.mkdir()
    (process / "stat").write_bytes((Path("/proc/self/stat")).read_bytes())
    (process / "cmdline").write_bytes(b"")
    monkeypatch.setattr("wsgi_ts.process._PROC", tmp_path)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (process / "cmdline").write_bytes(b"python\0-m\0wsgi_ts.guard\0")

    monkeypatch.setattr("wsgi_ts.process.time.sleep", sleep)
    assert command_line(77) == ["python", "-m", "wsgi_ts.guard", ""]
    assert len(naps) == 3
    assert command_line(78) == []


def test_the_arguments_of_running_and_ended_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "marked"])
    assert "marked" in command_line(process.pid)
    process.kill()
    eventually(lambda: start_time(process.pid) is None, within=20, what="a zombie")
    assert command_line(process.pid) == []
    process.wait()


def test_a_zombie_and_a_missing_process_have_no_start_time() -> None:
    process = subprocess.Popen(python("pass"))
    eventually(lambda: start_time(process.pid) is None, within=20, what="a zombie")
    process.wait()
    assert start_time(2**22 + 1) is None


def test_processes_of_an_instance_are_found_by_their_mark(children: list[Child]) -> None:
    prefix = "wsgi-ts-" + os.urandom(16).hex()
    child = Child("marked", python(SLEEP), environ={INSTANCE_VARIABLE: prefix})
    children.append(child)
    eventually(
        lambda: [process.pid for process in processes_of_instance(prefix)] == [child.pid],
        within=20,
        what="the marked process",
    )


def test_python_command_runs_a_module() -> None:
    assert python_command("some.module", "--x", "1")[-4:] == ["-m", "some.module", "--x", "1"]


@pytest.mark.parametrize("count", [1, 25])
def test_many_signals_at_once_do_no_harm(children: list[Child], count: int) -> None:
    code = (
        "import signal, time\n"
        "from wsgi_ts.process import enable_fault_traces\n"
        "enable_fault_traces()\n"
        "got = set()\n"
        f"wanted = range(signal.SIGRTMIN, signal.SIGRTMIN + {count})\n"
        "for number in wanted: signal.signal(number, lambda number, frame: got.add(number))\n"
        "print(1, flush=True)\n"
        "while len(got) < len(wanted): time.sleep(0.01)\n"
    )
    read, write = os.pipe()
    child = Child("many signals", python(f"import os; os.dup2({write}, 1)\n{code}"), pass_fds=[write])
    children.append(child)
    os.close(write)
    assert os.read(read, 1) == b"1"
    # Sent while it is stopped, they are all delivered together, each handler interrupting the one before.
    child.send_signal(signal.SIGSTOP)
    for number in range(signal.SIGRTMIN, signal.SIGRTMIN + count):
        child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60.0) == "exit code 0"
    os.close(read)


def test_wait_until_gone_has_a_limit(children: list[Child]) -> None:
    child = Child("sleeps", python(SLEEP))
    children.append(child)
    before = time.monotonic()
    assert wait_until_gone([child.identity], 0.1) == [child.identity]
    assert time.monotonic() - before >= 0.1
