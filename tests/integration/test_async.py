"""Models with `asyncCommunication`: many requests at a time in an async handler, answered in any order."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

#: Does what the JSON body says; a request can wait until another one, or the test by a file, lets it go on.
HANDLER = """
import asyncio, json, os, threading
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

class Handler:
    async def initialize(self, context):
        self.gates = {}
        self.loop = asyncio.get_running_loop()
        self.running = self.cancelled = self.most = 0
        context.visits = []

    def gate(self, name):
        return self.gates.setdefault(name, asyncio.Event())

    async def handle(self, data, context):
        assert asyncio.get_running_loop() is self.loop and len(data) == 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await getattr(self, data[0]["body"]["do"])(context, **data[0]["body"].get("with", {}))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def stats(self, context):
        return [{"running": self.running, "most": self.most, "cancelled": self.cancelled, "pid": os.getpid()}]

    async def wait(self, context, gate):
        await self.gate(gate).wait()
        return [gate]

    async def wait_for_file(self, context, path):
        open(f"{path}.{context.get_request_id(0)}", "w").close()
        while not os.path.exists(path):
            await asyncio.sleep(0.01)
        return [str(os.getpid())]

    async def open(self, context, gate):
        self.gate(gate).set()
        return ["open"]

    async def own_context(self, context, gate, name):
        context.set_response_header(0, "x-name", name)
        context.set_response_status(201, "Made", 0)
        context.name = name
        context.visits.append(name)
        await self.gate(gate).wait()
        who = context.get_request_header(0, "x-who")
        return [{"name": context.name, "id": context.get_request_id(0), "header": who}]

    async def visits(self, context):
        return [{"visits": context.visits, "own": hasattr(context, "name")}]

    async def stream(self, context, gate, parts):
        for number in range(parts):
            send_intermediate_predict_response([f"part{number},"], context.request_ids, "", 200, context)
            await asyncio.sleep(0)
        await self.gate(gate).wait()
        return ["end"]

    async def flood(self, context, chunks, size, patient):
        for _ in range(chunks):
            sent = send_intermediate_predict_response([b"\\xff" * size], context.request_ids, "", 200, context)
            if patient:
                await sent
        return [b"."]

    async def drip(self, context):
        while True:
            await send_intermediate_predict_response(["drop"], context.request_ids, "", 200, context)
            await asyncio.sleep(0.01)

    async def from_thread(self, context):
        def work():
            for number in range(3):
                send_intermediate_predict_response([f"{number}"], context.request_ids, "", 200, context)
            return ["3"]
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def break_stream(self, context):
        await send_intermediate_predict_response(["first"], context.request_ids, "", 200, context)
        raise RuntimeError("after the first chunk")

    async def throw(self, context, name):
        raise {"plain": RuntimeError("no"), "status": PredictionException("not here", 404), "exit": SystemExit(3)}[name]

    async def wrong(self, context):
        return ["one", "two"]

    async def cancel_itself(self, context):
        asyncio.current_task().cancel()
        await asyncio.sleep(60)
"""

CONFIG = """
minWorkers: 1
maxWorkers: 1
asyncCommunication: true
jobQueueSize: 1000
responseTimeout: 1
"""

#: A module-level function, whose initialising call is a coroutine, too.
FUNCTION = """
state = []

async def handle(data, context):
    if data is None:
        state.append("initialised")
        return None
    return [",".join(state)]
"""

SLOW_LOAD = """
import time

async def handle(data, context):
    if data is None:
        time.sleep(60)
"""

#: Answers two requests only when both are there.
WRAPPED = """
import asyncio

class Handler:
    def __init__(self):
        self.seen = 0
        self.both = asyncio.Event()

    async def handle(self, data, context):
        self.seen += 1
        if self.seen == 2:
            self.both.set()
        await self.both.wait()
        return [2 * number for number in data]
"""

#: An ordinary function: it holds up the event loop, but works.
PLAIN = """
def handle(data, context):
    return None if data is None else ["plain"]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(config={"slots_per_worker": "2048"}) as running:
        archive(running.store, "tasks", HANDLER, config_yaml=CONFIG)
        assert running.register("tasks.mar").status == 200
        yield running


def ask(server: ServerProcess, do: str, model: str = "tasks", who: str = "", **arguments: Any) -> Reply:
    body = json.dumps({"do": do, "with": arguments} if arguments else {"do": do})
    return server.predict(model, body, content_type="application/json", x_who=who)


def stats(server: ServerProcess, model: str = "tasks") -> dict[str, int]:
    numbers: dict[str, int] = json.loads(ask(server, "stats", model).body)
    return numbers


def start_stream(server: ServerProcess, do: str, **arguments: Any) -> socket.socket:
    """A connection on which a request was sent; nothing of its answer is read."""
    body = json.dumps({"do": do, "with": arguments})
    sock = socket.create_connection(("127.0.0.1", server.ports["inference"]), 30)
    sock.sendall(
        b"POST /predictions/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return sock


def read_until(sock: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        more = sock.recv(65536)
        assert more, f"connection closed before {text!r}: {data!r}"
        data += more
    return data


def test_requests_run_at_the_same_time_and_are_answered_in_any_order(server: ServerProcess) -> None:
    done: list[str] = []

    def wait_for(name: str) -> None:
        assert ask(server, "wait", gate=name).text == name
        done.append(name)

    with ThreadPoolExecutor(8) as pool:
        waiting = {name: pool.submit(wait_for, name) for name in ("a", "b", "c")}
        # One more than wait: the one that asks.
        eventually(lambda: stats(server)["running"] == 4, within=10)
        for name in ("c", "a", "b"):
            ask(server, "open", gate=name)
            waiting[name].result(60)
    assert done == ["c", "a", "b"]


def test_hundreds_of_requests_run_at_the_same_time(server: ServerProcess) -> None:
    count = 300
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(ask, server, "wait", gate="crowd") for _ in range(count)]
        eventually(lambda: stats(server)["running"] == count + 1, within=30)
        ask(server, "open", gate="crowd")
        assert {reply.result(60).text for reply in waiting} == {"crowd"}
    assert stats(server)["most"] >= count


def test_each_request_has_a_context_of_its_own(server: ServerProcess) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = (
            pool.submit(ask, server, "own_context", who=f"client {name}", gate="contexts", name=name)
            for name in ("one", "two")
        )
        eventually(lambda: stats(server)["running"] == 3, within=10)
        ask(server, "open", gate="contexts")
        replies: list[Reply] = [each.result(60) for each in (first, second)]
    for name, reply in zip(("one", "two"), replies, strict=True):
        assert (reply.status, reply.reason, reply.headers["x-name"]) == (201, "Made", name)
        answer = json.loads(reply.body)
        assert answer == {"name": name, "id": reply.headers["x-request-id"], "header": f"client {name}"}
    # What the context held when the model was loaded is shared; what a request puts there is its own.
    shared = json.loads(ask(server, "visits").body)
    assert sorted(shared["visits"]) == ["one", "two"]
    assert shared["own"] is False


def test_chunks_arrive_while_the_handler_goes_on(server: ServerProcess) -> None:
    with start_stream(server, "stream", gate="stream", parts=3) as sock:
        head = read_until(sock, b"part2,")
        assert b"ts_stream_next: true" in head
        assert b"end" not in head
        ask(server, "open", gate="stream")
        rest = read_until(sock, b"0\r\n\r\n")
    assert b"end" in rest


def test_chunks_may_be_sent_from_a_thread(server: ServerProcess) -> None:
    assert ask(server, "from_thread").text == "0123"


@pytest.mark.parametrize("patient", [True, False])
def test_a_client_that_reads_slowly_holds_up_nobody(server: ServerProcess, patient: bool) -> None:
    chunks, size = 400, 50_000
    with start_stream(server, "flood", chunks=chunks, size=size, patient=patient) as sock:
        received = read_until(sock, b"\xff\xff").count(b"\xff")
        # Much more than any buffer on the way holds is still to come, and nobody reads it.
        for _ in range(20):
            assert stats(server)["running"] >= 1
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = sock.recv(1 << 20)
            assert data
            received += data.count(b"\xff")
            tail = (tail + data)[-16:]
    assert received == chunks * size


def test_a_stream_whose_handler_fails_is_cut(server: ServerProcess) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(server, "break_stream")
    assert cut.value.partial == b"first"
    assert stats(server)["running"] == 1


@pytest.mark.parametrize(
    ("do", "arguments", "status", "message"),
    [
        ("throw", {"name": "plain"}, 503, "Prediction failed"),
        ("throw", {"name": "status"}, 404, "not here"),
        ("throw", {"name": "exit"}, 503, "Prediction failed"),
        ("wrong", {}, 503, "number of batch response mismatched"),
        ("cancel_itself", {}, 503, "Prediction failed"),
        ("no_such_method", {}, 503, "Prediction failed"),
    ],
)
def test_an_error_concerns_one_request(
    server: ServerProcess, do: str, arguments: dict[str, Any], status: int, message: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, server, "wait", gate=f"beside {do} {arguments}")
        reply = ask(server, do, **arguments)
        assert (reply.status, json.loads(reply.body)["message"]) == (status, message)
        ask(server, "open", gate=f"beside {do} {arguments}")
        assert other.result(60).status == 200


def test_the_task_of_a_client_that_has_gone_is_cancelled(server: ServerProcess) -> None:
    before = stats(server)["cancelled"]
    logged = len(server.log("model_log.log"))
    silent = start_stream(server, "wait", gate="never")
    streaming = start_stream(server, "drip")
    read_until(streaming, b"drop")
    eventually(lambda: stats(server)["running"] == 3, within=10)
    silent.close()
    streaming.close()
    eventually(lambda: stats(server)["running"] == 1, within=10)
    # The one that sends may find its stream closed before it is cancelled.
    assert stats(server)["cancelled"] >= before + 1
    assert "Invoking custom service failed" not in server.log("model_log.log")[logged:]


def test_clients_that_go_at_once_leave_nothing_behind(server: ServerProcess) -> None:
    for _ in range(200):
        start_stream(server, "wait", gate="never").close()
    eventually(lambda: stats(server)["running"] == 1, within=20)


def test_the_response_timeout_does_not_count(server: ServerProcess) -> None:
    pid = stats(server)["pid"]
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(ask, server, "wait", gate="timeout")
        # The model's responseTimeout is 1 s; a worker that is late is killed at the next tick.
        assert not wait_done(patient, 2.0)
        ask(server, "open", gate="timeout")
        assert patient.result(60).status == 200
    assert stats(server)["pid"] == pid


def wait_done(future: Future[Reply], seconds: float) -> bool:
    finished = threading.Event()
    future.add_done_callback(lambda _: finished.set())
    return finished.wait(seconds)


def test_a_worker_leaves_only_after_its_tasks(server: ServerProcess, tmp_path: Path) -> None:
    archive(server.store, "leaving", HANDLER, config_yaml=CONFIG.replace("responseTimeout: 1", "responseTimeout: 30"))
    assert server.register("leaving.mar").status == 200
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(ask, server, "wait_for_file", "leaving", path=os.fspath(gate))
        eventually(lambda: stats(server, "leaving")["running"] == 2, within=10)
        pid = stats(server, "leaving")["pid"]
        scaled = server.request("management", "PUT", "/models/leaving?min_worker=0&max_worker=0", body=b"")
        assert scaled.status == 202
        # It takes no more requests, but what it has goes on.
        eventually(lambda: ask(server, "stats", "leaving").status == 503, within=10)
        assert not last.done()
        gate.touch()
        assert last.result(60).text == str(pid)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), within=10)
    assert server.request("management", "DELETE", "/models/leaving").status == 200


def test_the_death_of_a_web_worker_cancels_its_tasks(server: ServerProcess) -> None:
    waiting = [start_stream(server, "wait", gate="never") for _ in range(3)]
    eventually(lambda: stats(server)["running"] == 4, within=10)
    (web_worker,) = server.processes("web-worker")
    web_worker.kill()
    for sock in waiting:
        with sock, contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    eventually(lambda: answers(server) and stats(server)["running"] == 1, within=30)


def answers(server: ServerProcess) -> bool:
    try:
        return ask(server, "stats").status == 200
    except OSError:
        return False


def test_workers_share_the_requests(server: ServerProcess, tmp_path: Path) -> None:
    archive(server.store, "pair", HANDLER, config_yaml=CONFIG.replace("Workers: 1", "Workers: 2"))
    assert server.register("pair.mar").status == 200
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(6) as pool:
        waiting = []
        for count in range(1, 7):  # one by one: a worker that is slow to take over gets the next one's share
            waiting.append(pool.submit(ask, server, "wait_for_file", "pair", path=os.fspath(gate)))
            eventually(lambda count=count: len(list(tmp_path.glob("gate.*"))) == count, within=10)
        gate.touch()
        pids = [reply.result(60).text for reply in waiting]
    assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3]
    assert server.request("management", "DELETE", "/models/pair").status == 200


def test_the_death_of_a_worker_fails_all_its_requests(server: ServerProcess) -> None:
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, server, "wait", gate="death") for _ in range(3)]
        eventually(lambda: stats(server)["running"] == 4, within=10)
        os.kill(stats(server)["pid"], signal.SIGABRT)
        for each in waiting:
            reply = each.result(60)
            assert (reply.status, json.loads(reply.body)["message"]) == (500, "Worker died.")
    eventually(lambda: ask(server, "stats").status == 200, within=30)


def test_the_initialising_call_of_a_function_is_awaited(server: ServerProcess) -> None:
    archive(
        server.store,
        "function",
        FUNCTION,
        config_yaml=CONFIG,
        manifest_overrides={"handler": "handler.py:handle"},
    )
    assert server.register("function.mar").status == 200
    assert server.predict("function").text == "initialised"


def test_an_envelope_keeps_requests_apart(server: ServerProcess) -> None:
    archive(server.store, "wrapped", WRAPPED, config_yaml=CONFIG, manifest_overrides={"envelope": "json"})
    assert server.register("wrapped.mar").status == 200

    def double(*numbers: int) -> list[int]:
        reply = server.predict("wrapped", json.dumps({"instances": numbers}), content_type="application/json")
        found: list[int] = json.loads(reply.body)["predictions"]
        return found

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(double, 1, 2, 3)
        second = pool.submit(double, 4)
        assert (first.result(60), second.result(60)) == ([2, 4, 6], [8])


def test_an_ordinary_handler_works_too(server: ServerProcess) -> None:
    archive(server.store, "plain", PLAIN, config_yaml=CONFIG)
    assert server.register("plain.mar").status == 200
    assert server.predict("plain").text == "plain"


def test_the_startup_timeout_counts(server: ServerProcess) -> None:
    archive(
        server.store,
        "slow",
        SLOW_LOAD,
        config_yaml=CONFIG + "startupTimeout: 1\nmaxRetryTimeoutInSec: 0\n",
        manifest_overrides={"handler": "handler.py:handle"},
    )
    assert server.register("slow.mar").status == 500
    eventually(lambda: "Worker did not load the model within 1 seconds" in server.log(), within=10)
    assert "Worker loaded the model successfully" in server.log()


def test_ranks_of_torchrun_are_refused(server: ServerProcess) -> None:
    archive(
        server.store,
        "ranks",
        HANDLER,
        config_yaml=CONFIG + "parallelType: tp\ntorchrun:\n  nproc-per-node: 2\n",
    )
    reply = server.register("ranks.mar")
    assert reply.status == 400
    assert "parallelType to custom" in json.loads(reply.body)["message"]
