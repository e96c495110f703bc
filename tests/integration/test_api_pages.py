"""The commands of the pages on the two APIs work as they are printed, and answer what is printed below them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.archives import archive
from support.server import ServerProcess

PAGES = Path(__file__).resolve().parents[2] / "docs"

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="the pages' commands need curl")


@dataclass(frozen=True)
class Example:
    """One block of commands, and the answer printed behind it, if any."""

    commands: str
    answer: str | None


def examples(page: str) -> list[Example]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```\n*(?=(```)?)", (PAGES / page).read_text(), re.DOTALL | re.MULTILINE)
    found = []
    for position, (language, text, follows) in enumerate(blocks):
        if language == "bash":
            answer = blocks[position + 1][1] if follows and blocks[position + 1][0] != "bash" else None
            found.append(Example(text, answer))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    with ServerProcess(store=store, config={"ts_open_inference_protocol": "true"}) as running:
        yield running


def run(server: ServerProcess, example: Example, directory: Path) -> str:
    """Types the commands; those without a printed answer must not be answered with an error."""
    options = "-sS" if example.answer is not None else "-sS --fail"
    script = example.commands.replace("curl ", f"curl {options} ")
    for port, api in ((8080, "inference"), (8081, "management")):
        script = script.replace(f"127.0.0.1:{port}", f"127.0.0.1:{server.ports[api]}")
    command = ["bash", "-euc", script]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{example.commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_page(server: ServerProcess, page: str, directory: Path, least: int) -> None:
    found = examples(page)
    assert len(found) >= least
    for example in found:
        output = run(server, example, directory)
        if example.answer is not None:
            assert squeezed(output) == squeezed(example.answer), example.commands
        else:
            assert output


def test_inference_page(server: ServerProcess, tmp_path: Path) -> None:
    assert server.register("echo.mar").status == 200
    check_page(server, "inference-api.md", tmp_path, 14)
    assert server.request("management", "DELETE", "/models/echo").status == 200


def test_management_page(server: ServerProcess, tmp_path: Path) -> None:
    check_page(server, "management-api.md", tmp_path, 13)
    assert server.request("management", "GET", "/models").json() == {"models": []}
