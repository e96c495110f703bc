"""The machine fails the server under load: disks, descriptors, the clock, the processor, system calls.

/dev/shm full or small: tests/integration/test_data_path.py; snapshots on a full disk: test_snapshots.py; no descriptor
in a web worker: test_fair_shares.py.
"""

from __future__ import annotations

import http.server
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import debian, faults, machine
from support.effort import PROVING, only_in_proofs
from support.eventually import eventually
from support.wall_clock import WallClock, compiler

from reliability.load import LedgerServer, Load, check, ledger_server

pytestmark = pytest.mark.chaos

needs_mounts = pytest.mark.skipif(not machine.mounts_are_possible(), reason="needs root and mount")
needs_strace = pytest.mark.skipif(debian.program("strace") is None, reason="needs strace")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")
#: How long a fault lasts, in seconds.
LASTS_S = 10.0 if PROVING else 1.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerServer]:
    """A server with the ledger on two workers."""
    folder = tmp_path_factory.mktemp("ledger")
    with ledger_server(folder, workers=2, batch_size=4, web_workers=2) as running:
        wait_for_answer(running)
        yield running


@contextmanager
def small_disk(tmp_path: Path, folder: str, megabytes: int, **arguments: Any) -> Iterator[LedgerServer]:
    """A server of whose folders one is on a disk of its own."""
    server = ledger_server(tmp_path, workers=2, web_workers=2, **arguments)
    try:
        place = server.home / folder
        place.mkdir(exist_ok=True)
        with machine.disk(place, megabytes):
            server.start()
            wait_for_answer(server)
            yield server
            assert not server.stop()
    finally:
        server.remove()


def wait_for_answer(server: LedgerServer) -> None:
    eventually(lambda: server.predict("ledger", b"x" * 32).status == 200, within=60, what="an answer")


@contextmanager
def served_all_the_while(server: LedgerServer) -> Iterator[Load]:
    """A load that must not notice what happens in the block."""
    before = {each.pid: each.role for each in server.processes()}
    with Load(server, clients=4, seed=secrets.randbits(20)) as load:
        eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
        yield load
        seen = load.count("ok")
        eventually(lambda: load.count("ok") > seen + 50, within=20, what="answers, afterwards")
    check(load, server.ledger, allowed_statuses=set())
    assert load.count("ok") == len(load.outcomes), load.summary
    gone = {pid: role for pid, role in before.items() if pid not in {each.pid for each in server.processes()}}
    assert not gone, f"ended: {gone}"


def go_on(load: Load, seconds: float = LASTS_S) -> None:
    """Lets a fault last, and so many requests be answered meanwhile."""
    seen = load.count("ok")
    time.sleep(seconds)
    eventually(lambda: load.count("ok") > seen + 20, within=20, what="answers, meanwhile")


@needs_mounts
def test_no_room_for_logs(tmp_path: Path) -> None:
    """Requests are answered as ever; when there is room again, it is written again."""
    with small_disk(tmp_path, "logs", 4) as server, served_all_the_while(server) as load:
        with machine.full(server.home / "logs"):
            go_on(load)
        assert server.request("inference", "GET", "/predictions/nobody").status == 404
        eventually(lambda: "nobody" in server.log("access_log.log"), within=20, what="a line, now that there is room")


@needs_mounts
def test_no_room_in_the_run_directory(tmp_path: Path) -> None:
    """Nothing can be registered, and nothing is left of the attempt; what is there is served."""
    with small_disk(tmp_path, "tmp", 16) as server, served_all_the_while(server) as load:
        models = set((server.run_dir / "models").iterdir())
        with machine.full(server.home / "tmp"):
            reply = server.register("ledger.mar", model_name="second")
            assert reply.status == 507, reply.text
            assert "space" in reply.json()["message"], reply.text
            go_on(load)
        assert set((server.run_dir / "models").iterdir()) == models
        comes_and_goes(server)


def comes_and_goes(server: LedgerServer) -> None:
    """One more model can be registered, and unregistered."""
    reply = server.register("ledger.mar", model_name="second")
    assert reply.status == 200, reply.text
    assert server.request("management", "DELETE", "/models/second").status == 200


class _Archives(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@needs_mounts
def test_no_room_in_the_model_store_and_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """An archive that is fetched does not fit: nothing of it stays. One that is there is registered all the same."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "large.mar").write_bytes(os.urandom(3 << 20))
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Archives, directory=os.fspath(served)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    config = {"allowed_urls": f"http://127.0.0.1:{web.server_port}/.*"}
    url = f"http://127.0.0.1:{web.server_port}/large.mar"
    try:
        with small_disk(tmp_path, "store", 2, config=config) as server, served_all_the_while(server):
            before = sorted(server.store.iterdir())
            assert server.register(url).status == 507
            assert sorted(server.store.iterdir()) == before
            with machine.read_only(server.store):
                reply = server.register(url)
                assert (reply.status, reply.json()["message"]) == (500, f"Failed to save model: {url}")
                comes_and_goes(server)
            assert sorted(server.store.iterdir()) == before
    finally:
        web.shutdown()
        web.server_close()


ROLES = ["batcher", "template", "supervisor", "guard", "inference-arbiter", "model-worker"]


@pytest.mark.parametrize("role", ROLES if PROVING else ROLES[:2])
def test_no_descriptor_is_left(role: str, server: LedgerServer) -> None:
    """What is there is served; what needs a descriptor is refused, and works again when there are some."""
    victim = faults.one(server, role)
    process = psutil.Process(victim.pid)
    with served_all_the_while(server) as load:
        with machine.without_descriptors(victim.pid):
            before = sum(process.cpu_times()[:2])
            reply = server.register("ledger.mar", model_name="starved")
            assert reply.status in (200, 500, 507), reply.text
            go_on(load)
            if role not in ("batcher", "model-worker"):  # these work for the load
                assert sum(process.cpu_times()[:2]) - before < 0.5 * LASTS_S + 1.0, "it spins"
        # One whose workers have failed to start stays registered, as in TorchServe.
        assert server.request("management", "DELETE", "/models/starved").status in (200, 404)
        comes_and_goes(server)


@needs_compiler
def test_the_clock_is_set(tmp_path: Path) -> None:
    """Hours forth and back, and steps all the time: no process is taken for hung, no wait gets longer or shorter."""
    clock = WallClock(tmp_path)
    with ledger_server(tmp_path, workers=2, web_workers=2, environment=clock.environment) as server:
        wait_for_answer(server)
        with served_all_the_while(server) as load:
            for ahead_s in (3600, -3600, 31_536_000, -86_400, 0):
                clock.set(ahead_s)
                go_on(load, LASTS_S / 2)
                comes_and_goes(server)
            for step in range(10):
                clock.set(300 * (-1) ** step)
                time.sleep(0.1)
        clock.set(3600)
        server.processes("guard")[0].kill(signal.SIGTERM)
        clock.set(-3600)
        eventually(lambda: not server.processes(), within=20, what="the end")


def test_others_take_the_processor(server: LedgerServer) -> None:
    """Nobody is taken for hung because he is slow."""
    with served_all_the_while(server) as load, machine.busy(8):
        go_on(load, 3 * LASTS_S)


def test_everything_stands_still(server: LedgerServer) -> None:
    """As when a virtual machine is suspended: afterwards all go on, and nobody is taken for hung."""
    members = server.processes()
    with served_all_the_while(server):
        for each in members:
            each.kill(signal.SIGSTOP)
        time.sleep(LASTS_S)
        for each in members:
            each.kill(signal.SIGCONT)


#: Faults of system calls that a process must get over; `when=` says at which calls.
CALLS = [
    ("web-worker", "epoll_wait:error=EINTR:when=1+3"),
    ("web-worker", "accept4:error=EMFILE:when=1+2"),
    ("web-worker", "accept4:error=ECONNABORTED:when=1+2"),
    ("batcher", "futex:error=EINTR:when=1+5"),
    ("model-worker", "futex:error=EINTR:when=1+5"),
    ("supervisor", "write:error=ENOSPC:when=1+2"),
    ("supervisor", "fsync:delay_enter=500000"),
    ("model-worker", "write:error=EIO:when=2+1000"),
]


@contextmanager
def failing_calls(victim: psutil.Process, fault: str) -> Iterator[None]:
    """Lets system calls of a process fail.

    It should have nothing to do at the end: a call that is under way while strace leaves fails with ENOSYS, which no
    kernel answers, and the process may end of that.
    """
    command = [debian.program("strace") or "", "-f", "-qq", "-o", os.devnull, "-p", str(victim.pid)]
    command += ["-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}"]
    tracer = subprocess.Popen(command, env=debian.environment(), stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


@needs_strace
@pytest.mark.parametrize(("role", "fault"), CALLS if PROVING else CALLS[:2])
def test_a_system_call_fails(role: str, fault: str, server: LedgerServer) -> None:
    allowed_statuses = {500, 503} if role == "model-worker" else set()
    with failing_calls(faults.one(server, role), fault), Load(server, clients=4, seed=secrets.randbits(20)) as load:
        eventually(lambda: load.count("ok") > 20, within=20, what="load under way")
        go_on(load, 2.0)
    check(load, server.ledger, allowed_statuses=allowed_statuses)
    assert load.cut == 0, load.summary
    with Load(server, clients=4, seed=secrets.randbits(20)) as load:
        eventually(lambda: load.count("ok") > 20, within=20, what="answers, afterwards")


@only_in_proofs
@pytest.mark.parametrize("role", ["batcher", "model-worker", "supervisor", "web-worker"])
def test_no_process_can_be_made(role: str, server: LedgerServer) -> None:
    """Fork fails: what runs serves; as soon as it can, it is whole again."""
    if debian.program("strace") is None:
        pytest.skip("needs strace")
    templates = [*server.processes("template"), *server.processes("inference-arbiter"), *server.processes("supervisor")]
    command = [debian.program("strace") or "", "-f", "-qq", "-o", os.devnull]
    command += [word for each in templates for word in ("-p", str(each.pid))]
    command += ["-e", "trace=clone,clone3,fork,vfork", "-e", "inject=clone,clone3,fork,vfork:error=EAGAIN"]
    whole = len(server.processes())
    with Load(server, clients=4, seed=secrets.randbits(20)) as load:
        eventually(lambda: load.count("ok") > 20, within=20, what="load under way")
        tracer = subprocess.Popen(command, env=debian.environment(), stderr=subprocess.DEVNULL)
        time.sleep(1)
        faults.one(server, role).kill()
        time.sleep(LASTS_S / 2)
        tracer.terminate()
        tracer.wait()
        eventually(lambda: len(server.processes()) >= whole, within=60, what="all processes")
        seen = load.count("ok")
        eventually(lambda: load.count("ok") > seen + 20, within=30, what="answers, afterwards")
    check(load, server.ledger, allowed_statuses={500, 503, 507})
