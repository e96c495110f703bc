"""Replays the recorded requests, in their order, against one server: every answer must be TorchServe's."""

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
def replay() -> Iterator[Replay]:
    config = {
        "job_queue_size": "100",
        "max_request_size": "70000",
        "max_response_size": "70000",
        "web_workers": "2",
    }
    with ServerProcess(store=RECORDING / "store", config=config) as server:
        yield Replay(server)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case["id"] for case in CASES])
def test_answer_is_torchserves(replay: Replay, index: int) -> None:
    case = CASES[index]
    reply = replay.answer(index)
    wanted = case["response"]
    assert {
        "status": reply.status,
        "content_type": reply.headers.get("content-type"),
        "transfer_encoding": reply.headers.get("transfer-encoding"),
        "header_names": sorted(reply.headers),
    } == {name: wanted[name] for name in ("status", "content_type", "transfer_encoding", "header_names")}
    assert_same_body(reply.body.decode("utf-8", "backslashreplace"), wanted["body"])


def assert_same_body(ours: str, theirs: str) -> None:
    """Compares two bodies but for what differs from run to run; of a cut one, what is there of it."""
    if CUT in theirs:
        theirs = theirs.partition(CUT)[0].rstrip()
        ours = ours[: len(theirs)]
    assert VOLATILE.sub(r"\1*", ours) == VOLATILE.sub(r"\1*", theirs)


def test_recording_is_the_whole_one() -> None:
    assert len(CASES) == 95
    assert len({case["id"] for case in CASES}) == len(CASES)
