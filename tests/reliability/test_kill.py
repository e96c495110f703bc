"""Each process of the server is killed under load: nobody gets another's bytes, nothing hangs, all comes back."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess
from support.slots import slots_in_use

from reliability.load import Load, check, executions, ledger_server

pytestmark = pytest.mark.chaos

#: Who is killed. How soon each is back, `make prove` measures: here other tests take the processor.
ROLES = (
    *("model-worker", "template", "batcher", "web-worker", "inference-arbiter", "management-arbiter", "grpc-server"),
    "supervisor",
)
BACK_S = 30.0


def answers(server: ServerProcess, count: int = 20) -> bool:
    """Whether so many requests in a row are answered well."""
    for _ in range(count):
        try:
            if server.predict("ledger", b"x" * 32).status != 200:
                return False
        except OSError:
            return False
    return True


def waiting(server: ServerProcess) -> int:
    """How many requests are in the model's queue."""
    (described,) = server.request("management", "GET", "/models/ledger").json()
    return int(described["jobQueueStatus"]["pendingRequests"])


def answered_since(load: Load, moment: float) -> bool:
    """Whether a request sent after `moment` was answered well."""
    return any(outcome.result == "ok" and outcome.sent_at > moment for outcome in load.outcomes)


@pytest.mark.parametrize("role", ROLES)
def test_a_process_is_killed_under_load(role: str, tmp_path: Path) -> None:
    config = {"batch_policy": "adaptive", "job_queue_size": "1000"}
    with ledger_server(tmp_path, web_workers=2, config=config) as server:
        server.register("ledger.mar", initial_workers=2, batch_size=4, max_batch_delay=5)
        before = {each.role for each in server.processes()}
        workers = len(server.processes("model-worker"))
        with Load(server) as load:
            eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
            for _ in range(2):
                faults.kill(server, role)
                killed_at = time.monotonic()
                eventually(
                    lambda: (
                        len(server.processes("model-worker")) == workers
                        and {each.role for each in server.processes()} == before
                    ),
                    within=BACK_S,
                    what=f"capacity after the death of a {role}",
                )
                eventually(partial(answered_since, load, killed_at), within=BACK_S, what="requests answered again")
        check(load, tmp_path, allowed_statuses={500, 503, 507})
        if role in ("model-worker", "template", "batcher", "management-arbiter", "grpc-server"):
            # Nobody who held a client's socket was killed.
            assert load.cut == 0, load.summary
        if role in ("management-arbiter", "grpc-server"):
            assert load.count("err") == 0, load.summary
        eventually(lambda: answers(server), within=20, what="twenty good answers in a row")


def test_requests_that_wait_survive_the_death_of_the_batcher(tmp_path: Path) -> None:
    """What no handler has seen is queued again by the next batcher, and answered well."""
    with ledger_server(tmp_path) as server:
        server.register("ledger.mar", initial_workers=1)
        with faults.paused(server, "model-worker"), Load(server, clients=4) as load:
            eventually(lambda: waiting(server) >= 1, within=20, what="requests in the queue")
            faults.kill(server, "batcher")
            eventually(lambda: load.count("ok") > 20, within=BACK_S, what="answers by the next batcher")
        assert load.cut == 0, load.summary
        # The one that the stopped worker had begun is lost; the queued ones are not.
        assert load.count("err") <= 1, load.summary
        check(load, tmp_path, allowed_statuses={500, 507})


def test_a_batcher_that_is_killed_in_overload_leaves_nothing_waiting(tmp_path: Path) -> None:
    """Refused requests free their slots, which are submitted again while there is no batcher to take them."""
    config = {"job_queue_size": "4", "slots_per_worker": "16"}
    with ledger_server(tmp_path, config=config) as server:
        server.register("ledger.mar", initial_workers=1, batch_size=1)
        with Load(server, clients=24) as load:
            for _ in range(3):
                refused = load.count("err")
                eventually(lambda: load.count("err") > refused + 50, within=20, what="refusals")  # noqa: B023
                faults.kill(server, "batcher")
                killed_at = time.monotonic()
                eventually(partial(answered_since, load, killed_at), within=BACK_S, what="answers by the next batcher")
        check(load, tmp_path, allowed_statuses={500, 503, 507})
        assert load.cut == 0, load.summary
        eventually(lambda: not slots_in_use(server.prefix), within=20, what="all slots free")
        assert answers(server, 3)


def test_a_stop_answers_what_was_accepted(tmp_path: Path) -> None:
    with ledger_server(tmp_path, web_workers=2) as server:
        server.register("ledger.mar", batch_size=4, max_batch_delay=5)
        with Load(server, clients=8) as load:
            eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
            started_at = time.monotonic()
            left = server.stop(signal.SIGTERM)
        assert not left
        check(load, tmp_path, allowed_statuses={503})
        # Every request that was read before the stop is answered; later ones find nobody listening.
        assert all(o.result == "ok" for o in load.outcomes if o.ended_at < started_at), load.summary
        # A request may still be on its way to an idle connection that the stop closes: then no handler has seen it.
        runs = executions(tmp_path)
        lost = [o for o in load.outcomes if o.result == "closed" and (o.whole_at < started_at or runs[o.nonce])]
        assert not lost, load.summary


def test_a_hung_handler_ends_at_its_response_timeout_and_harms_no_other_model(tmp_path: Path) -> None:
    with ledger_server(tmp_path) as server:
        archive(server.store, "hang", "import time\ndef handle(data, context):\n    while data: time.sleep(60)\n")
        server.register("ledger.mar")
        assert server.register("hang.mar", response_timeout=1).status == 200
        with Load(server, clients=4) as load:
            reply = server.predict("hang", b"x")
            eventually(lambda: load.count("ok") > 50, within=20, what="answers of the other model")
        assert (reply.status, reply.json()["message"]) == (500, "Worker died.")
        assert load.count("ok") == len(load.outcomes), load.summary


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_worker_killed_while_it_serves(number: signal.Signals, tmp_path: Path) -> None:
    with ledger_server(tmp_path) as server:
        source = "import os\ndef handle(data, context):\n    if data: os.kill(os.getpid(), int(data[0]['body']))\n"
        archive(server.store, "suicide", source)
        server.register("suicide.mar")
        reply = server.predict("suicide", str(int(number)))
        assert reply.json()["message"] == "Worker died."
        assert reply.status == (507 if number == signal.SIGKILL else 500)
        described = server.request("management", "GET", "/models/suicide").json()[0]
        assert described["workers"][0]["status"] in ("READY", "UNLOADING")


def test_a_stop_answers_what_cannot_be_waited_for(tmp_path: Path) -> None:
    with ledger_server(tmp_path, config={"graceful_timeout": "1"}) as server:
        source = "import time\ndef handle(data, context):\n    if data: print('begun', flush=True); time.sleep(60)\n"
        archive(server.store, "long", source)
        server.register("long.mar")
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.predict, "long", b"x")
            eventually(lambda: "begun" in server.log("model_log.log"), within=20, what="the handler at work")
            left = server.stop(signal.SIGTERM)
            assert reply.result().status == 503
        assert not left
