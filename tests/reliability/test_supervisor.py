"""The supervisor and its guard are killed: the one comes back as it was, with the other everything ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import faults
from support.archives import archive
from support.eventually import PATIENCE, eventually
from support.http import Reply
from support.processes import shared_memory
from support.server import ServerProcess

from reliability.load import Load, check, ledger_server
from wsgi_ts.supervisor.child import SupervisedProcess

pytestmark = pytest.mark.chaos

#: Generous: other tests run beside this one, and torch takes its time to load.
BACK_S = 60.0
ONE_SECOND = "import time\ntime.sleep(1)\ndef handle(data, context):\n    return [b'ok'] * len(data or [0])\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server with tokens and without snapshots, whose configuration names one model; others are registered."""
    config = {"disable_token_authorization": "false"}
    server = ServerProcess(config=config, arguments=["--models", "first=first.mar"])
    archive(server.store, "first", ONE_SECOND)
    archive(server.store, "echo")
    archive(server.store, "echo", version="2.0", file_name="echo2.mar")
    with server:
        manage(server, "POST", "/models?url=echo.mar&initial_workers=1&batch_size=4&max_batch_delay=7&synchronous=true")
        manage(server, "POST", "/models?url=echo2.mar&initial_workers=1&response_timeout=33&synchronous=true")
        manage(server, "PUT", "/models/echo/2.0/set-default")
        manage(server, "PUT", "/models/echo/1.0?min_worker=2&max_worker=3&synchronous=true")
        yield server


def token(server: ServerProcess, scope: str) -> dict[str, str]:
    """The header with a token of the key file."""
    key = json.loads((server.home / "key_file.json").read_text())[scope]["key"]
    return {"authorization": f"Bearer {key}"}


def manage(server: ServerProcess, method: str, path: str) -> Any:
    """Calls the management API, which must like it."""
    reply = server.request("management", method, path, headers=token(server, "management"), timeout=60.0)
    assert reply.status < 300, reply.text
    return reply.json()


def predict(server: ServerProcess, model: str, headers: dict[str, str]) -> Reply:
    """One prediction on a connection of its own."""
    return server.request("inference", "POST", f"/predictions/{model}", headers=headers, body=b"ok", timeout=BACK_S)


def described(server: ServerProcess) -> list[Any]:
    """What the management API says of all versions, but for what is new with each start."""
    found = []
    for model in manage(server, "GET", "/models/first/all") + manage(server, "GET", "/models/echo/all"):
        workers = model.pop("workers")
        found.append(model | {"workers": sorted(each["status"] for each in workers)})
    found.sort(key=lambda model: (model["modelName"], model["modelVersion"]))
    return [*found, manage(server, "GET", "/models/echo")[0]["modelVersion"]]


def statuses_until_answered(server: ServerProcess, headers: dict[str, str]) -> set[int]:
    """What requests to a model that takes a second to load are answered, up to the first good answer.

    Connections may be cut off, by web workers that end with the supervisor; none may be refused.
    """
    found = set()
    until = time.monotonic() + PATIENCE * BACK_S
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, http.client.HTTPException):
            reply = predict(server, "first", headers)
            if (reply.status, reply.body) == (200, b"ok"):
                return found
            found.add(reply.status)
        time.sleep(0.05)
    raise AssertionError(f"no good answer within {PATIENCE * BACK_S} s, but {found}")


def test_a_killed_supervisor_is_started_again_with_all_that_it_had(server: ServerProcess) -> None:
    headers, prefix = token(server, "inference"), server.prefix
    eventually(lambda: predict(server, "first", headers).status == 200, within=BACK_S, what="the model of the start")
    eventually(lambda: "UNLOADING" not in str(described(server)), within=BACK_S, what="all workers ready")
    before = described(server)
    numbers = [(each["minWorkers"], each["maxWorkers"], each["batchSize"]) for each in before[:2]]
    assert numbers == [(2, 3, 4), (1, 1, 1)]
    assert before[-1] == "2.0"
    roles = sorted(each.role for each in server.processes())
    for life in (2, 3):
        faults.kill(server, "supervisor")
        assert statuses_until_answered(server, headers) <= {503}
        eventually(lambda: described(server) == before, within=BACK_S, what=f"{before}, again")
        eventually(lambda: sorted(each.role for each in server.processes()) == roles, within=BACK_S, what="all roles")
        assert not shared_memory(prefix)
        prefix = server.prefix
        rows = {each["role"]: each for each in server.control.call("status")["processes"]}
        assert rows["supervisor"]["starts"] == life
        assert rows["guard"]["pid"] == server.processes("guard")[0].pid
        # The tokens that clients hold are good, and the file says the same.
        assert token(server, "inference") == headers
    # Never read by a fresh start.
    server.stop()
    server.start()
    assert [each["modelName"] for each in manage(server, "GET", "/models")["models"]] == ["first"]
    assert token(server, "inference") != headers


def test_the_guard_is_a_small_process(server: ServerProcess) -> None:
    (guard,) = server.processes("guard")
    assert psutil.Process(guard.pid).memory_full_info().pss < 10 * 2**20


def test_a_killed_guard_takes_everything_along_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    with ledger_server(tmp_path) as server:
        server.register("ledger.mar")
        prefix = server.prefix
        with Load(server, clients=4) as load:
            eventually(lambda: load.count("ok") > 20, within=20, what="load under way")
            faults.kill(server, "guard")
            eventually(lambda: not server.processes(), within=20, what="end of all processes")
        check(load, tmp_path, allowed_statuses=set())
        assert server.returncode == -signal.SIGKILL
        assert shared_memory(prefix), "the killed server left its names; the next start has something to clean"
        server.start()
        assert server.prefix != prefix
        assert not shared_memory(prefix)
        assert server.register("ledger.mar").status == 200


def test_a_supervisor_that_follows_gives_up_no_child_that_is_killed_before_it_has_worked(server: ServerProcess) -> None:
    """At a first start such ends would stop the server: there the configuration may be what is wrong."""
    headers = token(server, "inference")
    guard = faults.one(server, "guard").pid
    faults.kill(server, "supervisor")
    for _ in range(SupervisedProcess.LIVES):
        eventually(lambda: server.processes("batcher"), within=BACK_S, what="a batcher")
        faults.kill(server, "batcher")
    supervisor = faults.one(server, "supervisor").pid
    assert statuses_until_answered(server, headers) <= {500, 503, 507}
    assert faults.one(server, "guard").pid == guard
    assert faults.one(server, "supervisor").pid == supervisor
