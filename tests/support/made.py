"""What the examples' scripts make, models above all, is made once for all processes of a run of the tests."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

#: Names the folder of a run; the processes that run its tests inherit it.
_VARIABLE = "WSGI_TS_TEST_MADE"
_MAKES_A_MODEL = re.compile(r"python (?:\S*/)?examples/(?P<script>\S+\.py)(?P<arguments>(?: \S+)*) (?P<target>\S+)")


def begin() -> bool:
    """Makes the run's folder; False where this process is one of a run that has it already."""
    if _VARIABLE in os.environ:
        return False
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="wts-made-")
    return True


def end() -> None:
    """Removes the run's folder; for the process that has made it."""
    shutil.rmtree(os.environ.pop(_VARIABLE), ignore_errors=True)


def make_once(command: str, reader: Path, run: Callable[[], str]) -> str:
    """Runs a command, or copies what it made when it was run before, if it is a script of the examples.

    Args:
        command: as typed: `python examples/SCRIPT ARGUMENTS TARGET`, a folder or a file, runs such a script.
        reader: the current folder.
        run: runs the command there.

    Returns:
        What `run` returns; nothing where it is not called.
    """
    made = _MAKES_A_MODEL.fullmatch(command)
    if made is None:
        return run()
    target = reader / made["target"]
    copy = Path(os.environ[_VARIABLE]) / re.sub(r"\W", "_", made["script"] + made["arguments"])
    with copy.with_suffix(".lock").open("w") as lock:
        # Whoever comes while it is made waits for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.is_dir():
            shutil.copytree(copy, target, dirs_exist_ok=True)
            return ""
        if copy.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy, target)
            return ""
        before = set(target.iterdir()) if target.is_dir() else set()
        text = run()
        unfinished = copy.with_suffix(".part")
        if target.is_file():
            shutil.copy(target, unfinished)
        else:
            unfinished.mkdir()
            for path in set(target.iterdir()) - before:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, unfinished / path.name)
        unfinished.rename(copy)
        return text
