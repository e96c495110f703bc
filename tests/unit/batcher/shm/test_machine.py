"""Processors on which the data path is not safe are refused; `setarch` makes this machine say that it is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wsgi_ts.batcher.shm.machine import machine_problem

PROGRAM = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts(sys.argv[1:]))"


def run_as_i686(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    (folder / "store").mkdir(exist_ok=True)
    words = ["setarch", "i686", sys.executable, "-c", PROGRAM, command, "--model-store", "store", "--run-dir", "run"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le", "s390x", "riscv64", "i686"])
def test_other_processors_are_refused_by_name(machine: str) -> None:
    problem = machine_problem(machine)
    assert problem is not None
    assert f"processor ({machine}) is not supported" in problem


def test_x86_64_is_fine() -> None:
    assert machine_problem("x86_64") is None


def test_the_server_does_not_start_on_another_processor(tmp_path: Path) -> None:
    ended = run_as_i686(tmp_path, "serve")
    assert ended.returncode == 1
    assert "processor (i686) is not supported" in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr


def test_doctor_says_so_too(tmp_path: Path) -> None:
    ended = run_as_i686(tmp_path, "doctor")
    assert ended.returncode == 1
    assert "FAIL  processor" in ended.stdout
