"""The commands of docs/tuning.md, and those of docs/moving-over.md that read the files of a TorchServe, typed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.archives import archive
from support.server import REPOSITORY
from support.terminal import Terminal

DOCS = REPOSITORY / "docs"


def blocks(page: Path, language: str) -> list[str]:
    # All of them, so that what closes one is never taken for what opens the next.
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands need curl")
def test_the_page_on_tuning() -> None:
    page = DOCS / "tuning.md"
    [handler], [config] = blocks(page, "python"), blocks(page, "yaml")
    first, second = blocks(page, "bash")
    with Terminal() as terminal:
        terminal.configure(preload_modules="")
        terminal.write("accelerator.py", handler)
        terminal.write("model-config.yaml", config)
        (terminal.home / "model_store").mkdir()
        *before, tune = first.replace("\\\n", "").strip().splitlines()
        packs, starts, writes = before
        terminal.type(packs)
        terminal.start_server(starts)
        terminal.wait_for_workers("accelerator")
        terminal.type(writes)
        printed = terminal.type(f"{short(tune)} --max-workers 2")
        assert "Nothing was changed" in printed
        assert "+batchSize: " in printed
        tune, describe = second.strip().splitlines()
        printed = terminal.type(f"{short(tune)} --max-workers 2")
        assert "Applied, without a restart" in printed
        [now] = json.loads(terminal.type(describe))
        assert now["batchSize"] > 1
        assert f"batchSize: {now['batchSize']}" in printed


def short(command: str) -> str:
    """The page's command with a goal and a time for a busy machine."""
    assert "p99=100ms" in command
    return command.replace("p99=100ms", "p99=3000ms") + " --minutes 0.3 --max-batch-size 16"


def test_the_files_of_a_torchserve() -> None:
    page = DOCS / "moving-over.md"
    [command] = [block for block in blocks(page, "bash") if "--migrate" in block]
    [shown] = [block for block in blocks(page, "") if "netty_client_threads" in block]
    with Terminal() as terminal:
        terminal.write("config.properties", "#\n" * 6 + "netty_client_threads=4\nenable_model_api=false\n")
        (terminal.home / "model_store").mkdir()
        archive(
            terminal.home / "model_store",
            "digits",
            files={
                "digits_handler.py": "import os\n\nimport cv2_absent\nimport cv2\n\ndef handle(data, context):\n    ..."
            },
            config_yaml="minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 50\n",
            manifest_overrides={"handler": "digits_handler.py:handle"},
        )
        printed = terminal.type(command.replace("~/wsgi-ts/bin/", ""), status=1)
    lines = printed.splitlines()
    warning, failure, note = shown.strip().splitlines()
    assert warning in lines
    assert note in lines
    # Whether the real one is installed here is the machine's affair.
    assert failure.replace("cv2,", "cv2_absent,").replace("opencv-python", "cv2_absent") in lines
