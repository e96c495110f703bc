"""Replays the recorded requests, in their order: every answer must be TorchServe's, with direct answers and without."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess

RECORDING = Path(__file__).resolve().parents[1] / "golden"
CASES: list[dict[str, Any]] = json.loads((RECORDING / "rest.json").read_text())
#: The body of the one case whose body the recording only describes.
BODIES = {"in-toolarge": "x" * 70001}
#: Where a recorded body is cut.
CUT = "…"

#: Fields whose values differ from run to run.
VOLATILE = re.compile(r'("(?:startTime|pid|memoryUsage|id)": )("[^"]*"|-?\d+)')


class Replay:
    """Sends the recorded requests one after another and keeps the answers.

    A case that is asked for alone has all cases before it sent first: the answers depend on them.
    """

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._answers: list[Reply] = []

    def answer(self, index: int) -> Reply:
        while len(self._answers) <= index:
            self._answers.append(self._send(CASES[len(self._answers)]))
        return self._answers[index]

    def _send(self, case: dict[str, Any]) -> Reply:
        wanted = case["request"]
        self._settle(case["id"])
        body = BODIES.get(case["id"], wanted["body"])
        chunks = [body.encode()] if wanted["chunked"] else None
        return self._server.request(
            wanted["api"],
            wanted["method"],
            wanted["path"],
            headers=wanted["headers"],
            body=None if chunks else body,
            chunks=chunks,
            timeout=60,
        )

    def _settle(self, name: str) -> None:
        """Waits where the recording had time to pass: a scaling that was answered before it was done."""
        if name == "scale-sync2":
            eventually(lambda: self._ready_workers("funcs") == 2, within=30, what="the scaling before it")

    def _ready_workers(self, model: str) -> int:
        described = self._server.request("management", "GET", f"/models/{model}").json()
        return sum(worker["status"] == "READY" for worker in described[0]["workers"])


@pytest.fixture(scope="module")
def replays() -> Iterator[dict[str, Replay]]:
    """Two servers: one answers what it can without its app, in the other the app answers everything."""
    config = {
        "job_queue_size": "100",
        "max_request_size": "70000",
        "max_response_size": "70000",
        "web_workers": "2",
    }
    store = RECORDING / "store"
    with (
        ServerProcess(store=store, config={**config, "direct_answers": "true"}) as direct,
        ServerProcess(store=store, config={**config, "direct_answers": "false"}) as app,
    ):
        yield {"direct": Replay(direct), "app": Replay(app)}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case["id"] for case in CASES])
@pytest.mark.parametrize("way", ["direct", "app"])
def test_answer_is_torchserves(replays: dict[str, Replay], way: str, index: int) -> None:
    case = CASES[index]
    reply = replays[way].answer(index)
    wanted = case["response"]
    assert {
        "status": reply.status,
        "content_type": reply.headers.get("content-type"),
        "transfer_encoding": reply.headers.get("transfer-encoding"),
        "header_names": sorted(reply.headers),
    } == {name: wanted[name] for name in ("status", "content_type", "transfer_encoding", "header_names")}
    assert_same_body(reply.body.decode("utf-8", "backslashreplace"), wanted["body"])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case["id"] for case in CASES])
def test_both_ways_send_the_same(replays: dict[str, Replay], index: int) -> None:
    """Every header in its order, and every byte of the body, but for what differs from run to run."""
    direct, app = (replays[way].answer(index) for way in ("direct", "app"))
    assert _fixed_headers(direct) == _fixed_headers(app)
    assert _fixed_body(direct) == _fixed_body(app)


def _fixed_headers(reply: Reply) -> list[tuple[str, str]]:
    length = str(len(reply.body))
    return [
        (name, "*" if name == "x-request-id" or (name == "content-length" and value == length) else value)
        for name, value in reply.headers.items()
    ]


def _fixed_body(reply: Reply) -> str:
    body = reply.body.decode("utf-8", "backslashreplace")
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:*", VOLATILE.sub(r"\1*", body))


def assert_same_body(ours: str, theirs: str) -> None:
    """Compares two bodies but for what differs from run to run; of a cut one, what is there of it."""
    if CUT in theirs:
        theirs = theirs.partition(CUT)[0].rstrip()
        ours = ours[: len(theirs)]
    assert VOLATILE.sub(r"\1*", ours) == VOLATILE.sub(r"\1*", theirs)


def test_recording_is_the_whole_one() -> None:
    assert len(CASES) == 95
    assert len({case["id"] for case in CASES}) == len(CASES)
