"""Programs of Debian's packages that tests drive: the machine's own, or what `make debian` has unpacked into .venv."""

from __future__ import annotations

import os
import shutil

import pytest

from support.server import REPOSITORY

_UNPACKED = REPOSITORY / ".venv" / "debian"


#: Searched after PATH. Debian's usr/bin/chromium is a script that knows only of /usr/lib.
_FOLDERS = ("/usr/sbin", *(f"{_UNPACKED}/usr/{folder}" for folder in ("lib/chromium", "bin", "sbin")))


def program(name: str) -> str | None:
    """The path of a program; None where it is neither installed nor unpacked."""
    return shutil.which(name, path=":".join([os.environ.get("PATH", ""), *_FOLDERS]))


def environment() -> dict[str, str]:
    """The environment for a program: this process's, and where the libraries lie that were unpacked with it."""
    libraries = [_UNPACKED / root / "x86_64-linux-gnu" for root in ("usr/lib", "lib")]
    libraries += [folder for path in libraries for folder in path.glob("*/") if any(folder.glob("lib*.so*"))]
    known = os.environ.get("LD_LIBRARY_PATH", "")
    return {**os.environ, "LD_LIBRARY_PATH": ":".join([*map(os.fspath, libraries), *filter(None, [known])])}


def needs(name: str) -> None:
    """Skips the module that calls it where a program is missing."""
    if program(name) is None:
        pytest.skip(f"{name} is not installed, and 'make debian' has not unpacked it", allow_module_level=True)
