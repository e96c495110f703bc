"""A wall clock that a test can set, for one server: the real one is never touched."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


class WallClock:
    """A clock for the processes that are started with `environment`.

    Args:
        folder: where its library and its file go.

    Attributes:
        environment: what a process needs to have it.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "clock.so"
        self._file = folder / "clock"
        self.set(0)
        command = [compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"]
        subprocess.run(command, check=True)
        self.environment = {"LD_PRELOAD": os.fspath(library), "WSGI_TS_CLOCK": os.fspath(self._file)}

    def set(self, ahead_s: int) -> None:
        """Sets it so many seconds ahead of the real one, at once and in all processes that have it."""
        # Written in place: the processes have the file mapped.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", ahead_s))
