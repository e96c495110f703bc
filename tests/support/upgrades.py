"""`wsgi-ts upgrade`, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys

from support.server import REPOSITORY, ServerProcess

_WSGI_TS = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts())"


def upgrade(server: ServerProcess, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, with the server's configuration unless `flags` name another."""
    command = [sys.executable, "-c", _WSGI_TS, "upgrade", "--ncs", "--model-store", os.fspath(server.store)]
    command += ["--run-dir", os.fspath(server.run_dir), "--ts-config", os.fspath(server.ts_config or ""), *flags]
    environment = os.environ | {"PYTHONPATH": os.fspath(REPOSITORY), "TMPDIR": os.fspath(server.home / "tmp")}
    return subprocess.run(
        command, cwd=server.home, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
