"""`wsgi-ts upgrade`: another version in a running server's place, and back, without a refused connection."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle.pods import Service
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess
from support.upgrades import upgrade

from wsgi_ts.cli.start import supervisor_command
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.sources import CommandLine, load_config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "late")
    with ServerProcess(store=store, arguments=["--models", "echo.mar"], web_workers=2) as running:
        assert running.register("late.mar", initial_workers=2).status == 200
        yield running


def replace(server: ServerProcess, python: Path) -> None:
    """Asks for an upgrade to the server of another interpreter, and waits until something serves again."""
    line = CommandLine(
        ts_config=os.fspath(server.ts_config or ""),
        model_store=os.fspath(server.store),
        no_config_snapshots=True,
        run_dir=os.fspath(server.run_dir),
    )
    config: Config = load_config(line, {"LOG_LOCATION": os.fspath(server.home / "logs")})
    lives = lives_of(server)
    command = [os.fspath(python), *supervisor_command()[1:]]
    server.control.call("replace", command=command, config=config.to_json(), fixed=config.fixed)
    eventually(lambda: lives_of(server) > lives and has_started(server), within=60)


def status(server: ServerProcess) -> dict[str, Any]:
    found: dict[str, Any] = server.control.call("status")
    return found


def has_started(server: ServerProcess) -> bool:
    try:
        return bool(status(server)["started"])
    except Exception:  # between two lives nobody answers
        return False


def lives_of(server: ServerProcess) -> int:
    try:
        rows = status(server)["processes"]
    except Exception:  # between two lives nobody answers
        return 0
    return next(int(row["starts"]) for row in rows if row["role"] == "supervisor")


def interpreter(folder: Path, script: str) -> Path:
    """A program that stands for the interpreter of another installation."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class Knocking:
    """Connects to a port again and again; a context manager."""

    def __init__(self, port: int) -> None:
        self.accepted = self.refused = 0
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._knock)

    def __enter__(self) -> Knocking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _knock(self) -> None:
        while not self._is_over.wait(0.005):
            try:
                # Nobody takes them while the next server starts: where the backlog is full, one waits as long as that.
                socket.create_connection(("127.0.0.1", self._port), timeout=200).close()
                self.accepted += 1
            except ConnectionRefusedError:
                self.refused += 1


def test_no_request_is_lost_and_no_connection_refused(server: ServerProcess) -> None:
    before = status(server)
    port = server.ports["inference"]
    with (
        Service([port], "/predictions/echo", clients=6) as service,
        Knocking(server.ports["grpc_inference"]) as knocking,
    ):
        eventually(lambda: service.answered[port] > 100, within=60)
        done = upgrade(server)
        assert (done.returncode, done.stderr) == (0, ""), done
        at_end = service.answered[port]
        eventually(lambda: service.answered[port] > at_end + 100, within=60)
    assert service.outcomes.keys() == {"ok"}, service.outcomes
    assert knocking.refused == 0
    assert knocking.accepted > 100
    after = status(server)
    assert after["pid"] == before["pid"], "the process that a user has started goes on"
    assert lives_of(server) == 2
    described = server.request("management", "GET", "/models/late").json()[0]
    assert (described["minWorkers"], len(described["workers"])) == (2, 2), "as it was registered"
    assert not [line for line in server.output().splitlines() if "has ended" in line]


def test_an_upgrade_keeps_the_addresses(server: ServerProcess, tmp_path: Path) -> None:
    assert server.ts_config is not None
    text = server.ts_config.read_text()
    other = tmp_path / "config.properties"
    other.write_text(text + "metrics_address=http://127.0.0.1:1\n")
    done = upgrade(server, "--ts-config", os.fspath(other))
    assert done.returncode == 1
    assert "An upgrade cannot change metrics_address (http://127.0.0.1:" in done.stderr
    other.write_text(text + "job_queue_size=many\n")
    assert "job_queue_size" in upgrade(server, "--ts-config", os.fspath(other)).stderr
    assert server.predict("echo", b"1").body == b"1"


def test_to_another_version_and_back(server: ServerProcess, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "wsgi_ts", tmp_path / "wsgi_ts", ignore=shutil.ignore_patterns("__pycache__"))
    init = tmp_path / "wsgi_ts" / "__init__.py"
    before = status(server)["version"]
    init.write_text(init.read_text().replace(f'"{before}"', '"99.0"'))
    replace(server, interpreter(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"'))
    assert status(server)["version"] == "99.0"
    assert server.predict("late", b"1").body == b"1"
    done = upgrade(server)
    assert (done.returncode, done.stdout) == (0, f"Upgraded from 99.0 to {before}.\n"), done
    assert server.predict("late", b"2").body == b"2"


def test_a_version_that_cannot_serve_is_followed_by_the_one_before(server: ServerProcess, tmp_path: Path) -> None:
    before = lives_of(server)
    replace(server, interpreter(tmp_path, "echo 'no such module' >&2; exit 3"))
    assert "The new supervisor has never served (exit code 3); the one before is started again." in server.output()
    assert lives_of(server) == before + 2
    assert server.predict("late", b"3").body == b"3"
    config = json.loads((server.run_dir / "config.json").read_text())
    assert config["model_store"] == os.fspath(server.store)


def test_there_is_nothing_to_upgrade(tmp_path: Path, server: ServerProcess) -> None:
    done = upgrade(server, "--run-dir", os.fspath(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, f"Not running (run directory {tmp_path / 'none'}).\n")
