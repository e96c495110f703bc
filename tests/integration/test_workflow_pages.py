"""The page on workflows: its commands typed, its specifications read, its pictures those that `workflow show` draws."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import REPOSITORY
from support.terminal import EXAMPLES, Terminal

from wsgi_ts.workflows.source import open_source
from wsgi_ts.workflows.spec import parse_spec
from wsgi_ts.workflows.svg import svg

PAGE = REPOSITORY / "docs" / "workflows.md"
WORKFLOWS = EXAMPLES / "workflows"
IMAGES = REPOSITORY / "docs" / "images"
#: The pictures of the pages, and what they show.
PICTURES = {
    "breed": "breed/workflow.yaml",
    "breed-when": "breed/with_condition.yaml",
    "chain": "phrases/chain.yaml",
    "fan-out": "phrases/fan_out.yaml",
    "four-models": "four_models/workflow.yaml",
    "lines": "phrases/lines.yaml",
}
#: What commands print, by a part of the command.
ANSWERS = {
    "workflow check demo": "OK    processes: 4 nodes: 2 model workers, and one process for 2 functions",
    "workflow show demo": "──▶ en_de ──┐",
    "run demo": '"french": "le chien voit le oiseau"',
    "replace=true": "Workflow both has been registered and scaled successfully.",
    "workflows/both": '"workflowDag": "{sentence=[en_de, en_fr], en_de=[together], en_fr=[together]}"',
    "models/both__en_de": '"modelName": "both__en_de"',
    "-X DELETE": 'Workflow \\"both\\" unregistered',
    "events=true": 'event: answer\ndata: {\ndata:   "english": "the bird sings",\n',
    "wfpredict/lines": "der hund findet der baum\nder vogel singt heute\n",
    "show examples/workflows/four_models": "pre_processing ───▶ m1 ───▶ m2 ───▶ m3 ───▶ m4 ───▶ postprocessing",
    "check examples": "OK    processes: 4 nodes",
    "run --trace": '"german": "der mann findet der baum"',
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands need curl")
def test_the_page_typed() -> None:
    [answer] = blocks("json")
    told = set()
    with Terminal() as terminal:
        terminal.configure()
        shutil.copytree(EXAMPLES, terminal.home / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        terminal.write(".curlrc", "fail-with-body\n")
        for command in [line for block in blocks("bash") for line in block.splitlines()]:
            if command.startswith("torchserve --start"):
                terminal.start_server(command)
                continue
            printed = terminal.type(command)
            if command.endswith('wfpredict/both -d data="the man finds the tree"'):
                assert printed.rstrip() == answer.rstrip()
            for part in [part for part in ANSWERS if part in command]:
                if part == "workflows/both" and "DELETE" in command:
                    continue
                assert ANSWERS[part] in printed, command
                told.add(part)
        assert (terminal.home / "breed.svg").read_text(encoding="utf-8").startswith("<svg")
    assert told == set(ANSWERS)


def test_what_the_page_prints_of_the_examples() -> None:
    first, limit, options = blocks("yaml")
    assert first == (WORKFLOWS / "phrases" / "fan_out.yaml").read_text(encoding="utf-8")
    assert (parse_spec(first).timeout_ms, parse_spec(first + limit).timeout_ms) == (0, 30_000)
    spec = parse_spec(options)
    assert (spec.start, spec.leaves) == ("picture", ("summary",))
    [functions] = blocks("python")
    assert functions in (WORKFLOWS / "phrases" / "functions.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures(name: str, theme: str) -> None:
    """Drawn anew with `wsgi-ts workflow show FILE --theme THEME --svg PICTURE`."""
    path = WORKFLOWS / PICTURES[name]
    with open_source(path) as source:
        drawn = svg(parse_spec(source.spec_text, source.spec_name), source.name, theme=theme)
    assert (IMAGES / f"workflow-{name}-{theme}.svg").read_text(encoding="utf-8") == drawn


def test_no_page_shows_another_picture() -> None:
    pages = [PAGE, *WORKFLOWS.rglob("README.md")]
    shown = {name for page in pages for name in re.findall(r"workflow-[\w-]+\.svg", page.read_text(encoding="utf-8"))}
    made = {f"workflow-{name}-{theme}.svg" for name in PICTURES for theme in ("light", "dark")}
    assert shown == made == {path.name for path in IMAGES.glob("workflow-*.svg")}


def test_the_command_draws_them(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "wsgi-ts"), "workflow", "show", str(WORKFLOWS / PICTURES["lines"])]
    subprocess.run([*command, "--theme", "dark", "--svg", "drawn.svg"], cwd=tmp_path, check=True)
    assert (tmp_path / "drawn.svg").read_bytes() == (IMAGES / "workflow-lines-dark.svg").read_bytes()
