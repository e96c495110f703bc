"""The commands of the examples' pages, typed; and those of the tutorial on images, which makes what a page makes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.eventually import eventually
from support.terminal import EXAMPLES, Terminal

# The examples' own pages


PAGES = sorted(str(page.parent.relative_to(EXAMPLES)) for page in EXAMPLES.glob("*/**/README.md"))


#: What commands of the pages on workflows print, by a part of the command.
ANSWERS = {
    "workflow check demo/waves": "WARN  workflow.yaml:6: m1, m2, m3, m4: max-batch-delay 5000 ms",
    "workflow show demo/waves": "pre_processing ───▶ m1 ───▶ m2 ───▶ m3 ───▶ m4 ───▶ postprocessing",
    "demo/waves/square.json": '"wave": "square"',
    "demo/waves/sine.json": '"wave": "sine"',
    "demo/breed/dalmatian.png": '"breed": "dalmatian"',
    "demo/breed/poodle.png": '"breed": "poodle"',
    "demo/breed/cat.png": '"animal": "cat"',
    "phrases/store/both.war": '"french": "le chien voit le oiseau"',
    "phrases/store/there_and_back.war": '"english_again": "the dog sees the bird"',
    "phrases/store/lines.war": "der mann sucht der hund\nder vogel singt hier\n",
    "wfpredict/both": '"german": "der mann findet der baum"',
    "wfpredict/there_and_back": '"english_again": "the man finds the tree"',
    "wfpredict/lines": "der hund findet der baum\nder vogel singt heute\n",
}


def commands_of(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without downloads and comments; blocks marked sh need what is not here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if "https://" not in line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_commands_of_an_example(name: str) -> None:
    with Terminal() as terminal:
        terminal.configure()
        shutil.copytree(EXAMPLES, terminal.home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for config in EXAMPLES.rglob("*.config"):
            terminal.write(f"examples/{config.relative_to(EXAMPLES)}", config.read_text())
        terminal.write(".curlrc", "fail-with-body\n")
        for command in commands_of(EXAMPLES / name / "README.md"):
            if not command.startswith("torchserve --start"):
                printed = terminal.type(command)
                for part, expected in ANSWERS.items():
                    assert part not in command or command.startswith("torch-") or expected in printed
                continue
            terminal.start_server(command)
            at_start = re.search(r"--models (\w+)", command)
            if at_start is not None:
                terminal.wait_for_workers(at_start.group(1))


# Images with a bundled handler


@pytest.mark.slow
def test_densenet161() -> None:
    with Terminal() as terminal:
        terminal.configure()
        terminal.make("densenet161/make_files.py")
        terminal.copy(EXAMPLES / "densenet161" / "model.py", "serve/examples/image_classifier/densenet_161/model.py")
        terminal.copy(terminal.home / "index_to_name.json", "serve/examples/image_classifier/index_to_name.json")
        terminal.type("mkdir model_store")
        terminal.type(
            "torch-model-archiver --model-name densenet161 --version 1.0 "
            "--model-file ./serve/examples/image_classifier/densenet_161/model.py "
            "--serialized-file densenet161-8d451a50.pth --export-path model_store "
            "--extra-files ./serve/examples/image_classifier/index_to_name.json --handler image_classifier"
        )
        assert terminal.type("ls model_store/") == "densenet161.mar\n"
        terminal.start_server("torchserve --start --ncs --model-store model_store --models densenet161.mar")
        terminal.wait_for_workers("densenet161")
        answer = json.loads(terminal.type("curl http://127.0.0.1:8080/predictions/densenet161 -T kitten_small.jpg"))
        labels = set(json.loads((terminal.home / "index_to_name.json").read_text()).values())
        assert len(answer) == 5
        assert answer.keys() <= labels
        likelihoods = list(answer.values())
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert all(0 < likelihood < 1 for likelihood in likelihoods)
        access = terminal.home / "logs" / "access_log.log"
        eventually(lambda: access.read_text().count("/predictions/densenet161") == 1, within=5)
