"""The server under systemd: the notify socket, the watchdog, socket activation, and the units of deploy/."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

from wsgi_ts.http2.frames import PREFACE, FrameType, settings_frame
from wsgi_ts.models.environment import cache_folder

DEPLOY = REPOSITORY / "deploy"
#: What a handler sees of its environment.
ENVIRONMENT = """
import json, os

def handle(data, context):
    if data is None:
        return None
    return [json.dumps(dict(os.environ))] * len(data)
"""


class Manager:
    """A service manager's socket, and what it is told."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(os.fspath(path))
        threading.Thread(target=self._listen, daemon=True).start()

    def count(self, line: str) -> int:
        return self.said.count(line)

    def close(self) -> None:
        self._sock.close()

    def _listen(self) -> None:
        while True:
            try:
                self.said += self._sock.recv(4096).decode().split("\n")
            except OSError:
                return


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def test_the_manager_hears_when_it_serves_that_it_works_and_when_it_stops(
    store: Path, tmp_path: Path, manager: Manager, start_server: Any
) -> None:
    archive(store, "seen", ENVIRONMENT)
    environment = {"NOTIFY_SOCKET": os.fspath(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"}
    server: ServerProcess = start_server(store=store, environment=environment)
    eventually(lambda: manager.count("READY=1") == 1, within=20)
    assert server.register("seen.mar").status == 200
    # A handler that spoke to the manager would speak in the server's name.
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & server.predict("seen").json().keys()
    beats = manager.count("WATCHDOG=1")
    eventually(lambda: manager.count("WATCHDOG=1") >= beats + 2, within=20)
    # A supervisor that hangs is silent, so that the manager will end the server.
    (supervisor,) = server.processes("supervisor")
    os.kill(supervisor.pid, signal.SIGSTOP)
    eventually(lambda: silent_for(manager, 2.5), within=20)
    os.kill(supervisor.pid, signal.SIGCONT)
    beats = manager.count("WATCHDOG=1")
    eventually(lambda: manager.count("WATCHDOG=1") > beats, within=20)
    # One that has died is started again, and says so.
    os.kill(supervisor.pid, signal.SIGKILL)
    eventually(lambda: manager.count("READY=1") == 2, within=30)
    beats = manager.count("WATCHDOG=1")
    eventually(lambda: manager.count("WATCHDOG=1") > beats, within=20)
    assert manager.count("STOPPING=1") == 0
    assert server.stop() == []
    eventually(lambda: manager.count("STOPPING=1") == 1, within=20)


def silent_for(manager: Manager, seconds: float) -> bool:
    """Whether no beat comes for so long."""
    beats = manager.count("WATCHDOG=1")
    return not threading.Event().wait(seconds) and manager.count("WATCHDOG=1") == beats


def test_a_port_that_the_manager_keeps_open_refuses_nobody_during_a_restart(store: Path, start_server: Any) -> None:
    archive(store, "echo")
    ports = free_ports(2)
    with socket.create_server(("127.0.0.1", ports[0])) as kept, socket.create_server(("127.0.0.1", ports[1])) as grpc:
        sockets = {"inference": kept, "grpc_inference": grpc}
        server: ServerProcess = start_server(store=store, sockets=sockets, arguments=["--models", "echo.mar"])
        eventually(lambda: server.predict("echo", b"1").status == 200, within=20)
        assert server.stop() == []
        with (
            socket.create_connection(kept.getsockname(), timeout=30) as client,
            socket.create_connection(grpc.getsockname(), timeout=30) as other,
        ):
            client.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            other.sendall(PREFACE + settings_frame(()))
            server.start()
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            assert other.recv(9)[3] == FrameType.SETTINGS
        eventually(lambda: server.predict("echo", b"2").body == b"2", within=20)


def test_a_socket_of_another_port_is_told(store: Path) -> None:
    config = {"inference_address": f"http://127.0.0.1:{free_ports(1)[0]}"}
    with (
        socket.create_server(("127.0.0.1", free_ports(1)[0])) as other,
        pytest.raises(RuntimeError, match=r"hands over a socket on .*, which is none of inference_address http://"),
    ):
        ServerProcess(store=store, sockets={"inference": other}, config=config).start()


# The units


def unit(name: str) -> str:
    return (DEPLOY / name).read_text()


def test_the_unit_takes_away_what_is_not_needed() -> None:
    lines = set(unit("wsgi-ts.service").splitlines())
    assert {
        "Type=notify",
        "NotifyAccess=main",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "CapabilityBoundingSet=",
        "LimitCORE=0",
        "UMask=0077",
        "OOMPolicy=continue",
        "User=wsgi-ts",
        "KillMode=mixed",
    } <= lines
    assert {"TimeoutStartSec=infinity"} <= lines, "a start takes as long as its models' loading"
    for key in ("ReadWritePaths=", "RestrictAddressFamilies=", "TasksMax=", "WatchdogSec=", "ExecReload="):
        assert any(line.startswith(key) for line in lines), key


def test_the_unit_leaves_the_gpus() -> None:
    """No option shuts /dev/nvidia* out, by itself or by the DeviceAllow= that it implies, or forbids to compile."""
    keys = {line.partition("=")[0] for line in unit("wsgi-ts.service").splitlines()}
    assert not keys & {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute"}


def test_the_unit_has_a_place_for_the_environments_of_models() -> None:
    """Without a home, and where nothing but systemd's own directories can be written."""
    text = unit("wsgi-ts.service")
    variables = dict(
        pair.split("=", 1) for line in re.findall(r"^Environment=(.+)$", text, re.MULTILINE) for pair in line.split()
    )
    cache = re.search(r"^CacheDirectory=(.+)$", text, re.MULTILINE)
    assert cache is not None
    assert cache_folder(variables).is_relative_to(f"/var/cache/{cache[1]}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for name in ("wsgi-ts.service", "wsgi-ts.socket"):
        text = unit(name).replace("/opt/wsgi-ts/bin/wsgi-ts", sys.executable).replace("User=wsgi-ts\n", "")
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", tmp_path / "wsgi-ts.service", tmp_path / "wsgi-ts.socket"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not [line for line in run.stderr.splitlines() if "wsgi-ts" in line]


def test_the_commands_of_the_unit_are_ours() -> None:
    """The flags are those that the command line has."""
    from wsgi_ts.cli.commands import _wsgi_ts_parser

    commands = re.findall(
        r"^Exec(?:Start|Reload)=/opt/wsgi-ts/bin/wsgi-ts (.+)$", unit("wsgi-ts.service"), re.MULTILINE
    )
    assert [_wsgi_ts_parser().parse_args(each.split()).command for each in commands] == ["serve", "upgrade"]
