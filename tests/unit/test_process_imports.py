"""What the processes of a server do not import at their start: each import costs every start, and every test of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What only some processes have a use for.
HEAVY = {
    *("asyncio", "falcon", "gunicorn", "importlib.metadata", "numpy", "psutil", "torch", "yaml"),
    *("wsgi_ts.messages", "wsgi_ts.plugins.discovery"),
}
#: The modules that a process has imported when it begins its work, and what of the above it needs.
PROCESSES = {
    "command": ("wsgi_ts.cli.commands", set()),
    "guard": ("wsgi_ts.guard.guard", set()),
    "supervisor": ("wsgi_ts.supervisor.main", {"psutil", "wsgi_ts.messages", "yaml"}),
    "gunicorn": (
        "wsgi_ts.web.gunicorn_app, wsgi_ts.web.worker",
        {"asyncio", "falcon", "gunicorn", "importlib.metadata"},
    ),
    "gRPC server": ("wsgi_ts.rpc.main", {"asyncio"}),
    "batcher": ("wsgi_ts.batcher.main", {"wsgi_ts.messages", "wsgi_ts.plugins.discovery"}),
    "worker template": (
        "wsgi_ts.batcher.template.start, wsgi_ts.batcher.worker.main, wsgi_ts.handlers.serving.service",
        {"asyncio", "wsgi_ts.messages", "yaml"},
    ),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_imports_nothing_heavy_that_it_does_not_need(process: str) -> None:
    modules, needed = PROCESSES[process]
    code = f"import sys, {modules}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == needed
