"""The page on traces: its commands typed, and what they print, but for times and ids."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from support.eventually import eventually
from support.server import REPOSITORY
from support.terminal import Terminal

from wsgi_ts.settings.config import property_settings
from wsgi_ts.tracing.records import CLOSE_REASONS

PAGE = REPOSITORY / "docs" / "tracing.md"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def shape(text: str) -> str:
    """A printed text without what differs from run to run: ids, times, and so the bars, and which worker was free."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+", "DATE", text)
    text = re.sub(r"\d+(\.\d+)? ms *", "TIME ", text)
    text = re.sub(r"(\bworker |\bW-)900\d\b", r"\1WORKER", text)
    return re.sub(r" *#+ *| +", " ", text).strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands need curl")
def test_the_page_typed() -> None:
    [handler] = blocks("python")
    told = [block for block in blocks("") if block.startswith("Request ")]
    listed = json.loads(blocks("json")[0])
    commands = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith("pip ")]
    printed = []
    with Terminal() as terminal:
        terminal.configure()
        terminal.write("greet.py", handler)
        for command in commands:
            if command.startswith("torchserve --start"):
                terminal.start_server(command)
                terminal.wait_for_workers("greet")
            elif command.startswith("wsgi-ts explain"):
                # The record of the batch comes a moment after the answer.
                eventually(lambda: "Batch " in terminal.type(command), within=10, what="the story")  # noqa: B023
                printed.append(terminal.type(command))
            elif "/debug/traces" in command:
                [trace] = json.loads(terminal.type(command))["traces"]
                [shown] = listed["traces"]
                assert trace.keys() == shown.keys()
                same = (
                    "model",
                    "version",
                    "status",
                    "error",
                    "kept_because",
                    "batch_size",
                    "batch_close_reason",
                    "path",
                )
                assert {key: trace[key] for key in same} == {key: shown[key] for key in same}
                assert [each["name"] for each in trace["spans"]] == [each["name"] for each in shown["spans"]]
            else:
                terminal.type(command)
    assert list(map(shape, printed)) == list(map(shape, told))


def test_its_keys_and_reasons_are_those_of_the_server() -> None:
    text = PAGE.read_text(encoding="utf-8")
    settings = property_settings()
    for key in re.findall(r"^\| `(\w+)` \|", text.partition("## Settings")[2], re.MULTILINE):
        assert key in settings
    for reason in CLOSE_REASONS[1:]:
        assert f"`{reason}`" in text
    line = json.loads(blocks("json")[1])
    assert {"timestamp", "http.response.status_code", "model", "batch_size", "queue_ms", "infer_ms", "worker"} <= set(
        line
    )
