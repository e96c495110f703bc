"""What stops a start: one sentence, exit status 1, and nothing left behind; and what looks so and does not."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import pytest
from support.eventually import eventually
from support.processes import shared_memory
from support.server import REPOSITORY, ServerProcess

from wsgi_ts.instance.shared_memory import start_bytes
from wsgi_ts.settings.config import Config

#: Ends each process that is to run one of our modules, before it does anything: a new one, and one that was forked.
BREAK = """
import os, runpy, sys

def end():
    print("the interpreter is broken", file=sys.stderr, flush=True)
    os._exit(7)

if {module!r} in sys.orig_argv:
    end()
run_module = runpy.run_module
runpy.run_module = lambda name, **options: end() if name == {module!r} else run_module(name, **options)
"""
#: Has the web workers of gunicorn fail, not gunicorn itself.
BREAK_WORKERS = """
import os
from pathlib import Path
from wsgi_ts.dataplane.exchange import Exchange

make = Exchange.__init__

def fail(*arguments, **options):
    if Path(f"/proc/{os.getppid()}/cmdline").read_bytes().startswith(b"gunicorn"):  # the gRPC server has one, too
        raise OSError(12, "Cannot allocate memory")
    make(*arguments, **options)

Exchange.__init__ = fail
"""


def failed_start(server: ServerProcess) -> str:
    """Starts a server that must not start; returns the last line that it printed."""
    prefixes: list[str] = []

    def has_ended() -> bool:
        # Not written yet, or removed again.
        with contextlib.suppress(OSError, ValueError, KeyError):
            prefixes.append(server.prefix)
        return server.returncode is not None

    try:
        server.start(ready=False)
        eventually(has_ended, within=90, what="end of the start")
        assert server.returncode == 1, server.output()
        assert "Model server started" not in server.output()
        assert eventually(lambda: not server.processes(), within=20)
        assert not server.run_dir.exists()
        assert not [name for prefix in set(prefixes) for name in shared_memory(prefix)]
        return last_line(server)
    finally:
        server._kill_all()
        server._remove_home()


def last_line(server: ServerProcess) -> str:
    """The last line that it printed; a worker template may come after it, to say that its batcher is gone."""
    return next(line for line in reversed(server.output().splitlines()) if line and "[DEBUG]" not in line)


def broken(tmp_path: Path, module: str) -> dict[str, str]:
    """Variables with which no process of this module comes up."""
    (tmp_path / "sitecustomize.py").write_text(BREAK.format(module=module))
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}


def test_a_web_worker_that_never_boots_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAK_WORKERS)
    server = ServerProcess(environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"})
    assert failed_start(server) == (
        "gunicorn inference cannot be started: it ended 3 times before it had worked, at last with exit code 3; "
        "its last line: [Errno 12] Cannot allocate memory"
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("wsgi_ts.rpc", "gRPC server"),
        ("wsgi_ts.batcher", "batcher 0 (cpu)"),
    ],
)
def test_a_process_that_never_works_stops_the_start(tmp_path: Path, module: str, name: str) -> None:
    said = failed_start(ServerProcess(environment=broken(tmp_path, module)))
    ended = "cannot be started: it ended 3 times before it had worked, at last with exit code 7"
    assert said == f"{name} {ended}; its last line: the interpreter is broken"


def test_a_worker_template_that_never_works_stops_the_server(tmp_path: Path) -> None:
    """It is not a part of the start, which is over before it has imported torch: but it is not tried for ever."""
    server = ServerProcess(environment=broken(tmp_path, "wsgi_ts.batcher.template"))
    try:
        server.start(ready=False)
        eventually(lambda: server.returncode is not None, within=90, what="end of the server")
        assert server.returncode == 1
        assert last_line(server) == (
            "batcher 0 (cpu) cannot be started: its worker template ended again and again before it had worked; "
            "its last line: the interpreter is broken"
        )
        assert eventually(lambda: not server.processes(), within=20)
    finally:
        server._kill_all()
        server._remove_home()


def test_a_module_that_cannot_be_imported_once_for_all_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("import nothing_of_this_name\n")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    server = ServerProcess(config={"preload_modules": "json,half"}, environment=environment)
    said = failed_start(server)
    reason = "(No module named 'nothing_of_this_name'); correct the name, install it for "
    # The line of config.properties comes along, though the mistake shows long after it was read.
    assert re.fullmatch(
        rf".*/config\.properties:[0-9]+: preload_modules: half cannot be imported {re.escape(reason)}.*", said
    )


def test_a_run_directory_whose_path_is_too_long_stops_the_start(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    said = failed_start(ServerProcess(environment={"TMPDIR": str(deep)}))
    assert "its path is too long for a Unix socket in it (at most 94 bytes); set another --run-dir" in said


def test_what_looks_wrong_and_does_not_stop_the_start() -> None:
    """Values that TorchServe takes for others; and 1025 slots, which are made as 2048: as the doctor counts them."""
    config = {"async_logging": "2", "service_envelope": "kfserving", "metrics_mode": "loud", "slots_per_worker": "1025"}
    with ServerProcess(config=config) as server:
        for text in (
            "key async_logging: '2' is neither true nor false; taken for false, as in TorchServe",
            "key service_envelope: 'kfserving' is none of: body, json, kserve, kservev2; taken as not given",
            "key metrics_mode: 'loud' is none of: log, prometheus, legacy; the default is used: log",
        ):
            assert text in server.log()
            assert text in server.output()
        assert f"Configuration: {server.home}/config.properties:" in server.log()
        taken = sum(os.stat(f"/dev/shm/{name}").st_blocks * 512 for name in shared_memory(server.prefix))
    assert taken == start_bytes(Config(web_workers=1, slots_per_worker=1025), 1)
