"""Requests that end their worker before the handler has seen them, and workers that do not take what they are given."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import faults, http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

pytestmark = pytest.mark.chaos

#: Native code reads a request's JSON; with this handler it crashes.
FRAGILE = """
import orjson, os, signal, time

plain_loads = orjson.loads

def loads(text):
    if b"poison" in text:
        os.kill(os.getpid(), signal.SIGSEGV)
    return plain_loads(text)

class Handler:
    def initialize(self, context):
        orjson.loads = loads

    def handle(self, data, context):
        bodies = [row["body"] for row in data]
        print("begun", *bodies, flush=True)
        if "slow" in bodies:
            time.sleep(1)
        return bodies
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        archive(server.store, "fragile", FRAGILE)
        archive(server.store, "patient", FRAGILE)
        yield server


def ask(server: ServerProcess, model: str, word: str) -> http.Reply:
    headers = {"content-type": "application/json"}
    return server.request("inference", "POST", f"/predictions/{model}", headers=headers, body=f'"{word}"', timeout=120)


def test_a_request_that_ends_every_worker_is_answered_and_those_beside_it_are_served(server: ServerProcess) -> None:
    assert server.register("fragile.mar", batch_size=4, max_batch_delay=50).status == 200
    with ThreadPoolExecutor(5) as pool:
        slow = pool.submit(ask, server, "fragile", "slow")
        eventually(lambda: "begun slow" in server.log("model_log.log"), within=20, what="the handler at work")
        poison, *innocent = [pool.submit(ask, server, "fragile", word) for word in ("poison", "a", "b", "c")]
        assert (slow.result().status, slow.result().body) == (200, b"slow")
        reply = poison.result()
        assert reply.status == 500
        assert reply.json()["message"].startswith("Worker died. 3 workers ended before they had read this request")
        assert [each.result().body for each in innocent] == [b"a", b"b", b"c"]
    assert ask(server, "fragile", "after").body == b"after"
    told = "is answered 500, since 3 workers ended before they had read it"
    eventually(lambda: told in server.log(), within=20)
    # Only the handler's own crashes cost a worker.
    crash = "Fatal Python error: Segmentation fault"
    eventually(lambda: server.log("model_log.log").count(crash) == 3, within=20)


def test_a_worker_that_hangs_before_it_takes_a_request_is_replaced_and_the_request_served(
    server: ServerProcess,
) -> None:
    assert server.request("management", "DELETE", "/models/fragile").status in (200, 404)
    # Long enough for the next worker on a busy machine.
    assert server.register("patient.mar", response_timeout=6).status == 200
    eventually(lambda: len(server.processes("model-worker")) == 1, within=20, what="the one worker")
    with faults.paused(server, "model-worker") as victim:
        assert ask(server, "patient", "late").body == b"late"
        assert not victim.alive
