"""The load scripts of deploy/load, typed as their README prints them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from support.archives import archive
from support.server import REPOSITORY
from support.terminal import Terminal

[BLOCK] = re.findall(
    r"^```bash\n(.*?)^```", (REPOSITORY / "deploy/load/README.md").read_text(), re.DOTALL | re.MULTILINE
)
LOCUST, *WRK = BLOCK.splitlines()
#: So long that a moment in which the server is not there does not matter.
LONGER = LOCUST.replace("--run-time 5s", "--run-time 12s")
assert LONGER != LOCUST
#: Knows what the scripts send; refuses what it does not know.
HANDLER = """
def handle(data, context):
    for row, request in enumerate(data or []):
        known = request["body"] == [1.0, 2.0, 3.0] or str(request["body"]).startswith("# wsgi-ts")
        if not known:
            context.set_response_status(422, idx=row)
    return data and ["answer"] * len(data)
"""


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        terminal.configure()
        for name in ("README.md", "deploy/load/locustfile.py", "deploy/load/wrk.lua"):
            terminal.copy(REPOSITORY / name, name)
        (terminal.home / "store").mkdir()
        archive(terminal.home / "store", "my_model", HANDLER)
        terminal.start_server("torchserve --start --ncs --disable-token-auth --model-store store --models my_model.mar")
        terminal.wait_for_workers("my_model")
        yield terminal


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")
@pytest.mark.parametrize("command", WRK)
def test_wrk_counts_answers(terminal: Terminal, command: str) -> None:
    printed = terminal.type(command.replace("-d5s", "-d8s --timeout 60s"))
    assert re.search(r"^\d+ requests/s, p50 \d+\.\d+ ms, p99 \d+\.\d+ ms$", printed, re.MULTILINE)
    assert re.findall(r"^status (\d+): [1-9]\d*$", printed, re.MULTILINE) == ["200"]
    assert "without an answer: 0" in printed


def test_locust_finds_no_failure(terminal: Terminal) -> None:
    before = len(terminal.output())
    terminal.type(LONGER)
    table = terminal.output()[before:]
    assert re.search(r"^ *POST +/predictions/my_model +[1-9]\d* +0\(0\.00%\)", table, re.MULTILINE)


def test_locust_tells_of_failures(terminal: Terminal) -> None:
    before = len(terminal.output())
    terminal.type(LONGER.replace("--model my_model", "--model none"), status=1)
    assert "404 {" in terminal.output()[before:]
