"""What a service manager is told."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import pytest

from wsgi_ts.guard.notify import Notify


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_it_speaks_to_the_socket_that_is_named(kind: str, tmp_path: Path) -> None:
    name = os.fspath(tmp_path / "socket") if kind == "path" else f"@{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
        notify = Notify(environ)
        assert environ == {"A": "b"}, "no child speaks in the server's name"
        notify.beat()
        assert manager.recv(100) == b"WATCHDOG=1"
        notify.reloading()
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


def test_a_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    notify = Notify({"NOTIFY_SOCKET": os.fspath(tmp_path / "s"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"})
    assert not notify.is_watched


def test_without_a_manager_and_with_one_that_has_gone_nothing_happens(tmp_path: Path) -> None:
    for environ in ({}, {"WATCHDOG_USEC": "1"}, {"NOTIFY_SOCKET": os.fspath(tmp_path / "gone")}):
        notify = Notify(environ)
        notify.say("READY=1")
        notify.beat()
        assert not notify.is_watched
