"""Processes are killed or stopped while something else than a plain prediction is under way."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import faults
from support.archives import archive
from support.effort import PROVING
from support.eventually import eventually
from support.server import ServerProcess
from support.slots import slots_in_use

from reliability.load import LedgerServer, Load, check, ledger_server

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

BACK_S = 40.0
SLOW_LOAD = "import time\ntime.sleep(0.5)\ndef handle(data, context):\n    return data and [b'ok'] * len(data)\n"
STREAM = """
import time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data:
        for number in range(40):
            send_intermediate_predict_response([b"%04d" % number], context.request_ids, "ok", 200, context)
            time.sleep(0.05)
        return [b"last"]
"""
#: Who is killed; not the guard, with whom all ends.
ROLES = ["model-worker", "batcher", "web-worker", "supervisor", "management-worker", "template"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerServer]:
    folder = tmp_path_factory.mktemp("ledger")
    with ledger_server(folder, workers=2, batch_size=4, web_workers=2) as running:
        archive(running.store, "slow", SLOW_LOAD)
        archive(running.store, "stream", STREAM)
        eventually(lambda: running.predict("ledger", b"x" * 32).status == 200, within=60, what="an answer")
        yield running


def whole(server: ServerProcess) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in server.processes():
        found[each.role] = found.get(each.role, 0) + 1
    return found


def manage(server: ServerProcess, method: str, path: str) -> int:
    """The status of a management call; 0 where it was cut off or nobody answered."""
    try:
        return server.request("management", method, path, body=b"", timeout=60).status
    except (OSError, http.client.HTTPException):
        return 0


def cleanly_gone(server: ServerProcess, model: str) -> bool:
    return manage(server, "DELETE", f"/models/{model}") in (200, 404)


def upload(server: ServerProcess) -> None:
    """A large body arrives in pieces."""
    size = 1 << 20
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.putrequest("POST", "/predictions/ledger")
        connection.putheader("content-type", "application/octet-stream")
        connection.putheader("content-length", str(size))
        connection.endheaders()
        for _ in range(16):
            connection.send(b"u" * (size // 16))
            time.sleep(0.05)
        assert connection.getresponse().status in (200, 500, 503, 507)


def stream(server: ServerProcess) -> None:
    """An answer of many chunks; what was cut off never looks like a whole one."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        reply = server.request("inference", "POST", "/predictions/stream", body=b"x", timeout=60)
        if reply.status == 200:
            assert reply.body.endswith(b"last"), f"a part looks whole: {reply.body[-20:]!r}"
        else:
            assert reply.status in (500, 503, 507), reply.text


def registration(server: ServerProcess) -> None:
    manage(server, "POST", "/models?url=slow.mar&initial_workers=1&synchronous=true")


def scaling(server: ServerProcess) -> None:
    manage(server, "PUT", "/models/ledger?min_worker=3&synchronous=true")


def unregistering(server: ServerProcess) -> None:
    manage(server, "POST", "/models?url=slow.mar&initial_workers=1&synchronous=true")
    manage(server, "DELETE", "/models/slow")


#: What is under way, and how long after its beginning somebody is killed.
MOMENTS: dict[str, tuple[Callable[[ServerProcess], None], float]] = {
    "upload": (upload, 0.3),
    "stream": (stream, 0.5),
    "registration": (registration, 0.3),
    "scaling": (scaling, 0.1),
    "unregistering": (unregistering, 0.8),
}
CASES = [(moment, role) for moment in MOMENTS for role in ROLES]
IN_CI = [
    ("upload", "batcher"),
    ("stream", "model-worker"),
    ("registration", "supervisor"),
    ("unregistering", "batcher"),
]


@pytest.mark.parametrize(("moment", "role"), CASES if PROVING else IN_CI)
def test_a_process_is_killed_during(moment: str, role: str, server: LedgerServer) -> None:
    """Whatever becomes of the one thing, the others are served, nothing is left of it, and it can be done again."""
    act, after_s = MOMENTS[moment]
    if moment == "stream":
        assert server.register("stream.mar").status in (200, 409)
    before = whole(server)
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act(server)
        except BaseException as error:  # shown by the test's own thread
            failures.append(error)

    with Load(server, clients=2, seed=secrets.randbits(20), hang_s=BACK_S) as load:
        eventually(lambda: load.count("ok") > 20, within=20, what="load under way")
        thread = threading.Thread(target=guarded)
        thread.start()
        time.sleep(after_s)
        server.note_prefix()
        faults.kill(server, role)
        thread.join()
        seen = load.count("ok")
        eventually(lambda: load.count("ok") > seen + 20, within=BACK_S, what="answers, afterwards")
        eventually(lambda: cleanly_gone(server, "slow"), within=BACK_S, what="no model of the attempt")
        scale = "/models/ledger?min_worker=2&max_worker=2&synchronous=true"
        eventually(lambda: manage(server, "PUT", scale) == 200, within=BACK_S, what="two workers")
        eventually(lambda: whole(server) == before, within=BACK_S, what=f"{before}, and not {whole(server)}")
        if moment in ("registration", "unregistering"):
            assert server.register("slow.mar").status == 200
            assert manage(server, "DELETE", "/models/slow") == 200
    assert not failures, failures
    check(load, server.ledger, allowed_statuses={500, 503, 507})
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="all slots free")


PAUSED = [*ROLES, "guard", "inference-arbiter", "management-arbiter", "grpc-server"]


@pytest.mark.parametrize("role", PAUSED if PROVING else ["supervisor", "batcher", "web-worker"])
def test_a_process_stands_still_for_a_while(role: str, server: LedgerServer) -> None:
    """It goes on, or is replaced: nothing hangs, nobody gets another's answer, nothing runs twice."""
    before = whole(server)
    with Load(server, clients=4, seed=secrets.randbits(20), hang_s=BACK_S) as load:
        eventually(lambda: load.count("ok") > 20, within=20, what="load under way")
        with faults.paused(server, role):
            time.sleep(8.0 if PROVING else 1.5)
        seen = load.count("ok")
        eventually(lambda: load.count("ok") > seen + 20, within=BACK_S, what="answers, afterwards")
        eventually(lambda: whole(server) == before, within=BACK_S, what=f"{before}, and not {whole(server)}")
    check(load, server.ledger, allowed_statuses={500, 503, 507})
    if role in ("supervisor", "guard", "inference-arbiter", "management-arbiter", "grpc-server", "management-worker"):
        assert load.count("ok") == len(load.outcomes), load.summary


@pytest.mark.parametrize("role", ROLES if PROVING else ["batcher"])
def test_a_process_is_killed_during_the_stop(role: str, tmp_path: Path) -> None:
    """It ends all the same, in time, and nothing is left."""
    with ledger_server(tmp_path, workers=2, web_workers=2) as server, Load(server, clients=4, hang_s=BACK_S) as load:
        eventually(lambda: load.count("ok") > 20, within=30, what="load under way")
        server.note_prefix()
        guard = faults.one(server, "guard")
        guard.kill(signal.SIGTERM)
        time.sleep(0.1)
        for victim in server.processes(role)[:1]:
            victim.kill()
        eventually(lambda: not server.processes(), within=30, what="the end")
        assert not server.leftovers()
    check(load, tmp_path, allowed_statuses={500, 503, 507})


@pytest.mark.parametrize("role", ["supervisor", "management-worker"] if PROVING else ["supervisor"])
def test_what_a_snapshot_was_told_is_there_after_any_end(role: str, tmp_path: Path) -> None:
    """A call that was answered survives; one that was not is wholly there or not at all."""
    with ledger_server(tmp_path, snapshots=True) as server:
        archive(server.store, "slow", SLOW_LOAD)
        for round_ in range(5 if PROVING else 1):
            assert server.register("ledger.mar").status in (200, 409)
            told: list[int] = []
            call = lambda told=told: told.append(manage(server, "POST", "/models?url=slow.mar&initial_workers=1"))  # noqa: E731
            thread = threading.Thread(target=call)
            thread.start()
            time.sleep(0.02 * (round_ + 1))
            for victim in (*server.processes(role), *server.processes("guard")):
                victim.kill()
            thread.join()
            eventually(lambda: server.returncode is not None, within=20, what="the end of the guard")
            eventually(lambda: not server.processes(), within=20, what="the end of all processes")
            server.ts_config = None
            server.start()
            listed = json.loads(server.request("management", "GET", "/models").body)["models"]
            names = {each["modelName"] for each in listed}
            assert "ledger" in names
            if told[0] in (200, 202):
                assert "slow" in names, f"answered {told}, and lost"
            if "slow" in names:
                assert cleanly_gone(server, "slow")
