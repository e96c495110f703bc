"""The checker is checked: servers that are broken on purpose are found out, each by the invariant that it breaks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import faults
from support.effort import PROVING
from support.eventually import eventually
from support.http import RawConnection
from support.server import REPOSITORY, ServerProcess
from support.slots import slots_in_use

from reliability.load import Load, broken, ledger_server

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

BROKEN = Path(__file__).resolve().parent / "broken"
#: What must be found with each change of `broken/sitecustomize.py`; "" is the server as it is.
FOUND_BY = {
    "": set(),
    "run_again": {"run more than once"},
    "forget_the_dead": {"hang"},
    "leak_slots": {"slot in use"},
    "give_anothers_answer": {"wrong answer"},
    "free_too_early": {"wrong answer", "hang", "answered but never run", "status", "run more than once"},
    "lose_rings": {"hang"},
    "outlive_parents": {"process lives on"},
    "leave_names": {"left behind"},
}
IN_CI = ("run_again", "forget_the_dead", "leak_slots")
HANG_S = 4.0
#: Whether a kill meets something that runs is chance, the more so on a busy machine.
MOST_ROUNDS = 4


@contextmanager
def clients_that_leave(server: ServerProcess) -> Iterator[None]:
    """Besides, clients that hang up as soon as they have asked."""
    stop = threading.Event()
    head = "POST /predictions/ledger HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
    request = f"{head}content-length: 40\r\n\r\n{'g' * 40}".encode()

    def client() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), RawConnection(server.ports["inference"], 5.0) as connection:
                connection.send(request)
                time.sleep(0.002)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def invariants_broken(change: str, tmp_path: Path) -> set[str]:
    """Runs a server through what the other tests do, and returns which invariants did not hold."""
    environment = {
        "PYTHONPATH": f"{BROKEN}{os.pathsep}{REPOSITORY}",
        "WSGI_TS_BROKEN": change,
        "WSGI_TS_COMPILED": "0",
        # So long that whoever is killed has something to do.
        "WSGI_TS_LEDGER_MS": "50",
    }
    server = ledger_server(tmp_path, workers=2, batch_size=4, web_workers=1, environment=environment)
    found = set()
    try:
        server.start()
        server.note_prefix()
        with clients_that_leave(server), Load(server, clients=8, hang_s=HANG_S) as load:
            for _ in range(4):
                seen = len(load.outcomes)
                time.sleep(0.5)
                # On a busy machine it takes longer until there is something under way to be hit.
                with contextlib.suppress(AssertionError):
                    eventually(lambda seen=seen: len(load.outcomes) > seen, within=2, what="load")
                with contextlib.suppress(AssertionError):
                    faults.kill(server, "model-worker")
            time.sleep(0.5)
        found |= {each.what for each in broken(load, tmp_path, allowed_statuses={500, 503, 507})}
        try:
            eventually(lambda: not slots_in_use(server.prefix), within=3, what="all slots free")
        except AssertionError:
            found.add("slot in use")
        if change in ("", "outlive_parents"):
            faults.kill(server, "guard")
            try:
                eventually(lambda: not server.processes(), within=20, what="the end of all processes")
            except AssertionError:
                found.add("process lives on")
        if change in ("", "leave_names"):
            if change == "":
                eventually(lambda: server.returncode is not None, within=20, what="the end of the guard")
                server.start()
            try:
                if server.stop(signal.SIGTERM):
                    found.add("left behind")
            except AssertionError:
                found.add("no end")
    finally:
        server.remove()
    return found


@pytest.mark.parametrize("change", FOUND_BY if PROVING else IN_CI)
def test_a_broken_server_is_found_out(change: str, tmp_path: Path) -> None:
    found: set[str] = set()
    for number in range(MOST_ROUNDS if change else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        found |= invariants_broken(change, folder)
        print(change, found)
        if found & FOUND_BY[change]:
            return
    assert found == FOUND_BY[change], f"{change} is not noticed; only {found}"
