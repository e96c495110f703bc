"""Processes that were forked before they are needed become what a new one would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from wsgi_ts.process import ProcessIdentity, wait_until_gone

ROOT = Path(__file__).resolve().parents[3]
#: What is run: it tells of itself through the descriptor that is its first argument.
WHAT = """
import json, os, signal, sys
facts = {
    "parent": os.getppid(),
    "own session": os.getsid(0) == os.getpid(),
    "arguments": sys.argv[1:],
    "main": __name__,
    "had": "colorsys" in sys.modules,
    "X": os.environ.get("X"),
    "OLD": os.environ.get("OLD"),
    "descriptors": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + fd)),
    "stdin": os.readlink("/proc/self/fd/0"),
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
}
os.write(int(sys.argv[1]), json.dumps(facts).encode())
print("to stderr", file=sys.stderr)
sys.exit(3)
"""
#: What all the scripts below begin with: two processes wait.
BEGIN = """
import json, os, signal, sys, threading, time
from wsgi_ts.supervisor.child_process import Child
from wsgi_ts.process import python_command
from wsgi_ts.supervisor.spare_processes import Spares
os.environ["OLD"] = "1"
held = os.open("/dev/null", os.O_RDONLY)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
spares = Spares()
spares.fork(2, ["colorsys"])
signal.pthread_sigmask(signal.SIG_SETMASK, ())
del os.environ["OLD"]
"""
RUN = """
def run(spare):
    read, write = os.pipe()
    errors, stderr = os.pipe()
    os.dup2(write, 50)
    command = python_command("what", "50", "--word", "a b")
    child = Child("c", command, pass_fds=[50], environ={"X": "y"}, stderr=stderr, spare=spare)
    for fd in (write, 50, stderr):
        os.close(fd)
    with open(read) as facts, open(errors) as said:
        told = {**json.load(facts), "said": said.read(), "end": child.wait(100)}
    child.close()
    return told
"""


def script(tmp_path: Path, *parts: str) -> Any:
    """Runs a script in a process of its own, since this one has threads; what it prints is JSON."""
    (tmp_path / "what.py").write_text(WHAT)
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", "".join(parts)]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_of_them_becomes_what_a_new_process_would_be(tmp_path: Path) -> None:
    end = "spare = spares.take(); pid = spare.pid; forked = run(spare); spares.close()\n"
    forked, new, parent = script(tmp_path, BEGIN, RUN, end, "print(json.dumps([forked, run(None), os.getpid()]))")
    assert forked.pop("had") and not new.pop("had")
    assert forked == new
    assert forked["parent"] == parent
    assert forked["own session"]
    assert forked["arguments"] == ["50", "--word", "a b"]
    assert (forked["main"], forked["X"], forked["OLD"]) == ("__main__", "y", None)
    assert forked["descriptors"] == [0, 1, 2, 50]
    assert (forked["stdin"], forked["blocked"]) == ("/dev/null", 0)
    assert (forked["said"], forked["end"]) == ("to stderr\n", "exit code 3")


def test_where_one_has_ended_a_new_process_is_started(tmp_path: Path) -> None:
    end = "spare = spares.take(); os.kill(spare.pid, signal.SIGKILL)\n"
    end += "os.waitid(os.P_PID, spare.pid, os.WEXITED | os.WNOWAIT); told = run(spare)\n"
    told = script(tmp_path, BEGIN, RUN, end, "spares.close(); print(json.dumps(told))")
    assert (told["end"], told["had"]) == ("exit code 3", False)


def test_those_that_nobody_takes_end(tmp_path: Path) -> None:
    end = (
        "one = spares.take(); os.kill(one.pid, signal.SIGSTOP); one.end(); spares.close(); print(spares.take() or 0)\n"
    )
    check = "try: os.waitpid(-1, os.WNOHANG)\nexcept ChildProcessError: pass\nelse: raise SystemExit('one is left')\n"
    assert script(tmp_path, BEGIN, end, check) == 0


def test_they_do_not_outlive_who_has_forked_them(tmp_path: Path) -> None:
    pids = script(tmp_path, BEGIN, "print(json.dumps([spares.take().pid, spares.take().pid]), flush=True); os._exit(0)")
    left = [identity for identity in map(ProcessIdentity.of, pids) if identity is not None]
    assert wait_until_gone(left, 10.0) == []


def test_none_is_forked_beside_a_thread(tmp_path: Path) -> None:
    begin = BEGIN.replace(
        "spares.fork", "threading.Thread(target=time.sleep, args=(1,), daemon=True).start()\nspares.fork"
    )
    assert script(tmp_path, begin, "print(json.dumps(spares.take() is None))")
