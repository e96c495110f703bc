"""What one client, or one model, does must not cost the others: amounts, silence, connections, calls that wait."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.archives import archive
from support.eventually import eventually
from support.faults import one
from support.http import RawConnection, Reply
from support.processes import SHM, shared_memory
from support.server import ServerProcess
from support.slots import slots_in_use

SLOTS = 16
MAX_REQUEST = 6_000_000
SOFT_LIMIT = 1000
#: More than these synchronous calls wait in threads of their own.
LOADING = 10

#: Sends one chunk and is silent until the file named by its body exists.
SILENT = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response
def handle(data, context):
    if data is None:
        return None
    send_intermediate_predict_response(["first"], context.request_ids, "", 200, context)
    deadline = time.monotonic() + 100
    while not os.path.exists(data[0]["body"].decode()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ["last"]
"""

#: Runs until the file named by its body exists.
GATED = """
import os, time
def handle(data, context):
    if data is None:
        return None
    deadline = time.monotonic() + 100
    while not all(os.path.exists(row["body"].decode()) for row in data) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ["done"] * len(data)
"""

#: Loads until the file "loaded" exists in the server's directory of temporary files.
LOADS = """
import os, time
class Handler:
    def initialize(self, context):
        gate = os.path.join(os.environ["TMPDIR"], "loaded")
        deadline = time.monotonic() + 300
        while not os.path.exists(gate) and time.monotonic() < deadline:
            time.sleep(0.02)
    def handle(self, data, context):
        return [b"" for _ in data]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "silent", SILENT)
    archive(store, "gated", GATED)
    archive(store, "loads", LOADS)
    config = {"slots_per_worker": str(SLOTS), "job_queue_size": "2000", "max_request_size": str(MAX_REQUEST)}
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(SOFT_LIMIT, before[0]), before[1]))
    running = ServerProcess(store=store, config=config)
    try:
        running.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with contextlib.ExitStack() as stack:
        stack.push(running)
        for name in ("echo", "silent", "gated"):
            reply = running.register(f"{name}.mar")
            assert reply.status == 200, reply.text
        yield running


def post(model: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}"
    return f"{head}\r\n\r\n".encode() + body


def cpu_share(process: psutil.Process, seconds: float) -> float:
    """What part of a core a process uses for so long."""
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, ended = process.cpu_times(), time.monotonic()
    return (after.user + after.system - before.user - before.system) / (ended - began)


# Silence


def test_a_silent_stream_takes_no_processor_time(server: ServerProcess, tmp_path: Path) -> None:
    """Neither while its client waits, nor after that has hung up: fast answers before had the loop look actively."""
    worker = psutil.Process(one(server, "web-worker").pid)
    gate = tmp_path / "gate"
    with server.raw() as fast:
        for number in range(100):
            fast.send(post("echo", b"%d" % number))
            assert fast.read_answer()[2] == b"%d" % number
    with server.raw() as raw:
        raw.send(post("silent", str(gate).encode()))
        raw.read_head()
        assert next(raw.read_chunks()) == b"first"
        assert cpu_share(worker, 1.0) < 0.2
    assert cpu_share(worker, 1.0) < 0.2
    gate.touch()
    eventually(lambda: not slots_in_use(server.prefix), within=10, what="the slot of the stream that was left")
    assert server.predict("silent", str(gate)).body == b"firstlast"


# Amounts


def shared_bytes(server: ServerProcess) -> int:
    """Bytes of /dev/shm that the instance has."""
    return sum((SHM / name).stat().st_blocks * 512 for name in shared_memory(server.prefix))


def test_bodies_take_memory_as_they_come_and_not_as_they_are_announced(server: ServerProcess) -> None:
    before = shared_bytes(server)
    with contextlib.ExitStack() as stack:
        for _ in range(SLOTS // 2):
            raw = stack.enter_context(server.raw())
            raw.send(post("echo", b"x" * 80, MAX_REQUEST))
        eventually(lambda: slots_in_use(server.prefix)["WRITING"] == SLOTS // 2, within=5)
        assert shared_bytes(server) - before <= SLOTS // 2 * 2 * 65536
        # Slow uploads leave half of the slots to requests that are complete.
        with server.raw() as late:
            late.send(post("echo", b"x" * 80, MAX_REQUEST))
            line, _, body = late.read_answer()
        assert line.split()[1] == b"503"
        assert b"Too many request bodies are being received." in body
        assert server.predict("echo", b"complete").body == b"complete"
    eventually(lambda: not slots_in_use(server.prefix), within=5, what="all slots free")
    large = os.urandom(MAX_REQUEST)
    assert server.predict("echo", large).body == large


def test_a_model_leaves_slots_to_the_others(server: ServerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(SLOTS + 1) as pool:
        slow = [pool.submit(server.predict, "gated", str(gate)) for _ in range(SLOTS + 1)]
        try:
            eventually(lambda: sum(each.done() for each in slow) == 2, within=10, what="two answers at once")
            for reply in [each.result() for each in slow if each.done()]:
                assert reply.status == 503
                assert reply.json()["type"] == "ServiceUnavailableException"
                assert reply.json()["message"].startswith('Model "gated" has as many requests under way')
            assert server.predict("echo", b"fast").body == b"fast"
        finally:
            gate.touch()
        statuses = sorted(each.result().status for each in slow)
    assert statuses == [200] * (SLOTS - 1) + [503] * 2


# Connections


def limits_of(pid: int) -> tuple[int, int]:
    """A process's soft and hard limit of open files."""
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)


def test_only_processes_that_hold_connections_raise_their_limit_of_open_files(server: ServerProcess) -> None:
    soft, hard = limits_of(one(server, "supervisor").pid)
    for role in ("web-worker", "management-worker", "grpc-server"):
        assert limits_of(one(server, role).pid) == (min(hard, 65536), hard), role
    assert limits_of(one(server, "model-worker").pid) == (soft, hard)


def ask(connection: RawConnection) -> bytes:
    connection.send(post("echo", b"hello"))
    return connection.read_answer()[2]


def test_without_descriptors_the_connections_there_are_served_as_before(server: ServerProcess) -> None:
    pid = one(server, "web-worker").pid
    limits = limits_of(pid)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(server.raw())
        assert ask(kept) == b"hello"
        open_files = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files + 3, limits[1]))
        try:
            others = [stack.enter_context(server.raw()) for _ in range(20)]
            for other in others:
                other.send(post("echo", b"hello"))
            eventually(lambda: "New connections wait" in server.output(), within=5)
            took = []
            for _ in range(300):
                began = time.monotonic()
                assert ask(kept) == b"hello"
                took.append(time.monotonic() - began)
            assert min(took) < 0.05, "a pause at each"
            # One that goes makes room for one that waits, in whatever order they were taken.
            for other in others:
                assert other.read_answer()[2] == b"hello"
                other.close()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert server.output().count("New connections wait") == 1
    assert server.predict("echo", b"after").body == b"after"


# Calls that wait


@pytest.mark.slow
def test_calls_that_wait_hold_up_none_that_is_answered_at_once(server: ServerProcess) -> None:
    replies: list[Reply] = []

    def load(number: int) -> None:
        replies.append(server.register("loads.mar", model_name=f"loads{number}"))

    loading = [threading.Thread(target=load, args=(number,)) for number in range(LOADING)]
    for each in loading:
        each.start()
    try:
        listed = [f"loads{number}" for number in range(LOADING)]
        eventually(
            lambda: {each["modelName"] for each in models(server)} >= set(listed), within=30, what="all in the list"
        )
        assert server.request("metrics", "GET", "/metrics").status == 200
        path = "/models/echo/1.0/set-default"
        assert server.request("management", "PUT", path, body=b"").status == 200
        assert server.request("management", "PUT", "/models/echo?min_worker=1", body=b"").status == 202
        assert replies == []
    finally:
        (server.home / "tmp" / "loaded").touch()
        for each in loading:
            each.join(300)
    assert [reply.status for reply in replies] == [200] * LOADING
    for number in range(LOADING):
        assert server.request("management", "DELETE", f"/models/loads{number}").status == 200


def models(server: ServerProcess) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = server.request("management", "GET", "/models").json()["models"]
    return listed
