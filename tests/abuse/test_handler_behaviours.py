"""Handlers that fail, cheat, break their process or end it: their batch is answered, and the next request served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

from abuse.behaviours import BEHAVIOURS, HANDLER, Behaviour

pytestmark = pytest.mark.chaos

#: Beside each behaviour in its batch, as a rule.
INNOCENT = 3
#: No answer tells of the inside.
LEAKS = re.compile(rb'Traceback|File "|\.py", line|/dev/shm|wsgi-ts-[0-9a-f]{32}')


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        archive(server.store, "odd", HANDLER)
        archive(server.store, "other", HANDLER)
        # Only what hangs is ended by a time-out: a busy machine may take seconds for anything else.
        for name, limit_s in (("odd", 60), ("hanging", 1)):
            numbers = {"batch_size": INNOCENT + 1, "max_batch_delay": 30, "response_timeout": limit_s}
            assert server.register("odd.mar", model_name=name, **numbers).status == 200
        assert server.register("other.mar").status == 200
        yield server


def ask(server: ServerProcess, model: str, body: bytes) -> http.Reply:
    headers = {"content-type": "application/octet-stream"}
    return server.request("inference", "POST", f"/predictions/{model}", headers=headers, body=body, timeout=90)


def pid_of(reply: http.Reply, body: bytes) -> int:
    """Checks that the answer is the request's own; returns who gave it."""
    pid, _, echoed = reply.body.partition(b" ")
    assert echoed == body, reply
    return int(pid)


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=[each.name for each in BEHAVIOURS])
def test_a_behaviour(server: ServerProcess, behaviour: Behaviour) -> None:
    model = "hanging" if behaviour.hangs else "odd"
    before = eventually(lambda: _pid(server, model), within=20, what="a worker")
    bodies = [f"innocent {number} of {behaviour.name}".encode() for number in range(INNOCENT)]
    code = b"do:" + behaviour.code.encode("utf-8", "surrogatepass")
    with ThreadPoolExecutor(INNOCENT + 1) as pool:
        first = pool.submit(ask, server, model, bodies[0])
        odd = pool.submit(ask, server, model, code)
        others = [pool.submit(ask, server, model, body) for body in bodies[1:]]
        replies = dict(zip(bodies, [first.result(), *(other.result() for other in others)], strict=True))
    reply = odd.result()
    assert reply.status in behaviour.statuses, (reply.status, reply.body[:300])
    if reply.status >= 400:
        assert set(reply.json()) == {"code", "type", "message"}
        assert not LEAKS.search(reply.body), reply.body
    for body, other in replies.items():
        assert other.status in behaviour.others, (other.status, other.body[:300])
        if other.status == 200:
            pid_of(other, body)
    after = eventually(lambda: _pid(server, model), within=20, what="a worker afterwards")
    if behaviour.lives is not None:
        assert (after == before) == behaviour.lives
    assert ask(server, "other", b"x").status == 200


def _pid(server: ServerProcess, model: str) -> int | None:
    """Which process serves a model; None while there is none."""
    reply = ask(server, model, b"good")
    return pid_of(reply, b"good") if reply.status == 200 else None


def test_afterwards_each_model_has_one_worker_and_a_stop_leaves_nothing(server: ServerProcess) -> None:
    """The stop is the fixture's, which looks for what is left."""
    assert eventually(lambda: len(server.processes("model-worker")) == 3, within=20)
