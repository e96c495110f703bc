"""Processes are killed under a load of workflow requests, and thousands of them fail: nothing is left of them."""

from __future__ import annotations

import http.client
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.processes import Member
from support.server import ServerProcess
from support.slots import slots_in_use
from support.wars import war

from reliability.load import Load, check, ledger_server

pytestmark = pytest.mark.chaos

#: Around the model that keeps the ledger: a function on each side, and a branch that is read beside it.
GRAPH = """
models:
  retry-attempts: 0
  timeout-ms: 50000
  ledger: {url: ledger.mar, batch-size: 4, max-workers: 2}
dag:
  enter: [ledger, beside]
  ledger: [leave]
  beside: [leave]
"""
FUNCTIONS = """
def enter(data, context):
    return None if data is None else [row["body"] for row in data]

def beside(data, context):
    return None if data is None else [bytes(row["body"])[:32] for row in data]

def leave(data, context):
    if data is None:
        return None
    (row,) = data
    assert bytes(row["ledger"])[:32] == bytes(row["beside"]), "two requests are mixed up"
    return [row["ledger"]]
"""
ROLES = ("model-worker", "batcher", "web-worker")
BACK_S = 30.0


def free(server: ServerProcess) -> bool:
    return not slots_in_use(server.prefix)


@pytest.mark.parametrize("role", ROLES)
def test_a_process_is_killed_under_workflows(role: str, tmp_path: Path) -> None:
    with ledger_server(tmp_path, web_workers=2, config={"job_queue_size": "1000"}) as server:
        war(server.store, "graph", GRAPH, FUNCTIONS)
        reply = server.request("management", "POST", "/workflows?url=graph.war", timeout=60)
        assert reply.status == 200, reply.text
        workers = len(server.processes("model-worker"))
        assert workers == 3, "two of the model, one for all functions"
        chance = random.Random(7)
        with Load(server, "graph", route="wfpredict") as load:
            eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
            for _ in range(4):
                # Of the model's workers and the functions' host whichever it is.
                victim: Member = chance.choice(server.processes(role))
                victim.kill()
                killed_at = time.monotonic()
                eventually(partial(_answered_since, load, killed_at), within=BACK_S, what="requests answered again")
                eventually(
                    lambda: len(server.processes("model-worker")) == workers and server.processes(role),
                    within=BACK_S,
                    what="all workers",
                )
        check(load, tmp_path, allowed_statuses={500, 503})
        if role != "web-worker":
            assert load.cut == 0, load.summary
        eventually(partial(free, server), within=20, what="no slot in use")


def _answered_since(load: Load, moment: float) -> bool:
    return any(outcome.result == "ok" and outcome.sent_at > moment for outcome in load.outcomes)


#: Fails, sleeps as long as the body says, or waits for the file that it names.
MOODY = """
import os
import time

def enter(data, context):
    return None if data is None else [data[0]["body"]]

def mood(data, context):
    if data is None:
        return None
    what = bytes(data[0]["body"]).decode()
    if what == "fail":
        raise ValueError("no")
    if what.startswith("/"):
        open(what + ".begun", "w").close()
        ends_at = time.monotonic() + 100
        while not os.path.exists(what) and time.monotonic() < ends_at:
            time.sleep(0.005)
    else:
        time.sleep(float(what))
    return ["slept"]
"""
SPEC = """
models:
  {model}
  retry-attempts: 0
  timeout-ms: {timeout}
dag:
  enter: [mood, beside]
"""
BESIDE = "\ndef beside(data, context):\n    return None if data is None else [{}]\n"


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess(web_workers=1, config={"job_queue_size": "5", "metrics_mode": "prometheus"}) as running:
        archive(running.store, "slow", MOODY.replace("def mood", "def handle"))
        war(running.store, "moody", SPEC.format(model="", timeout=50000), MOODY + BESIDE)
        text = SPEC.format(model="mood: {url: slow.mar, timeout-ms: 60000, retry-attempts: 0}", timeout=60000)
        war(running.store, "slow", text, MOODY + BESIDE)
        for name in ("moody", "slow"):
            reply = running.request("management", "POST", f"/workflows?url={name}.war", timeout=60)
            assert reply.status == 200, reply.text
        yield running


def ask(server: ServerProcess, workflow: str, body: str) -> Reply:
    return server.request("inference", "POST", f"/wfpredict/{workflow}", body=body)


def of_the_web_worker(server: ServerProcess) -> tuple[int, int]:
    """Its threads and its descriptors."""
    folder = Path("/proc") / str(faults.one(server, "web-worker").pid)
    return len(os.listdir(folder / "task")), len(os.listdir(folder / "fd"))


@pytest.mark.slow
def test_ten_thousand_requests_that_fail(server: ServerProcess) -> None:
    assert ask(server, "moody", "fail").json()["message"] == "Error executing mood"
    eventually(partial(free, server), within=20, what="no slot in use")
    threads, descriptors = of_the_web_worker(server)
    failures: list[str] = []

    def client() -> None:
        for _ in range(2500):
            reply = ask(server, "moody", "fail")
            if reply.status != 500:
                failures.append(reply.text)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not failures, failures[:3]
    eventually(partial(free, server), within=20, what="no slot in use")
    eventually(lambda: of_the_web_worker(server)[1] <= descriptors, within=20, what="no more descriptors")
    eventually(lambda: of_the_web_worker(server)[0] == threads, within=20, what="as many threads as before")


def test_a_full_queue_and_clients_that_hang_up(server: ServerProcess, tmp_path: Path) -> None:
    """What waits for a client that has gone is never run; where too many wait, the next is told when to come again."""
    gate = tmp_path / "gate"
    connections = []
    for number in range(6):  # one runs, five wait
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=120)
        connection.request("POST", "/wfpredict/slow", f"{gate}")
        connections.append(connection)
        if not number:
            eventually(Path(f"{gate}.begun").exists, within=20, what="the one that runs")
        eventually(lambda number=number: waiting(server, "slow__mood") == number, within=20, what="those that wait")
    reply = ask(server, "slow", "0")
    assert (reply.status, reply.json()["type"]) == (503, "ServiceUnavailableException")
    assert reply.headers["retry-after"].isdigit()
    Path(f"{gate}.begun").unlink()
    for connection in connections[1:]:
        connection.close()
    eventually(lambda: gone(server, "slow") == 5, within=20, what="the server to notice")
    gate.touch()
    assert connections[0].getresponse().status == 500, "slept is no JSON object"
    connections[0].close()
    eventually(lambda: ask(server, "slow", "0").status == 500, within=20, what="a free worker")
    assert not Path(f"{gate}.begun").exists(), "the five others have not run"
    eventually(partial(free, server), within=20, what="no slot in use")


def waiting(server: ServerProcess, model: str) -> int:
    """How many requests are in a model's queue."""
    (described,) = server.request("management", "GET", f"/models/{model}").json()
    return int(described["jobQueueStatus"]["pendingRequests"])


def gone(server: ServerProcess, workflow: str) -> int:
    """How many clients of a workflow have hung up, as far as the server knows."""
    text = server.request("metrics", "GET", "/metrics").text
    found = re.findall(rf'^ts_workflow_requests_total{{workflow_name="{workflow}",code="499",}} (\S+)$', text, re.M)
    return int(float(found[0])) if found else 0
