"""A container as Kubernetes makes one: read-only root, 64 MB of /dev/shm, uid 1000, no right, nobody's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.server import REPOSITORY

#: In a mount namespace of its own: what may be written is the folder, /dev/shm and nothing else. An interpreter in a
#: home that others cannot enter is shown at the same place.
_SCRIPT = r"""
set -e
folder=$1; prefix=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o size=64m,mode=1777 none /dev/shm
home=/$(echo "$prefix" | cut -d/ -f2)
if ! setpriv --reuid 1000 --clear-groups test -x "$prefix/bin"; then
    mkdir -p "$folder.python"
    mount --bind "$prefix" "$folder.python"
    mount -t tmpfs -o mode=755 none "$home"
    mkdir -p "$prefix"
    mount --move "$folder.python" "$prefix"
    mount -o remount,ro "$home"
fi
mount --bind "$folder" "$folder"
mount -o remount,bind,ro /
cd /
exec setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def is_possible() -> bool:
    """Whether this process may make one."""
    if os.getuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    tried = subprocess.run(["unshare", "-m", "mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return tried.returncode == 0


def sandboxed(folder: Path, *command: str) -> list[str]:
    """The command line that runs a command in one; its process is the command's.

    Args:
        folder: the only one that can be written, by uid 1000.
        command: what to run.
    """
    folder.mkdir(exist_ok=True)
    os.chown(folder, 1000, 1000)
    return ["unshare", "-m", "sh", "-c", _SCRIPT, "sh", os.fspath(folder), sys.base_prefix, *command]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a container: nothing of this one's but the path."""
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": os.fspath(REPOSITORY), "HOME": "/nonexistent"}
    return {**paths, "TMPDIR": os.fspath(folder), **variables}
