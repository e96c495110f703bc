"""What README.md shows first, typed."""

from __future__ import annotations

import re

from support.server import REPOSITORY
from support.terminal import Terminal


def test_the_first_screen() -> None:
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Why")[0]
    install, python, commands, answer = re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert install == "pip install .\n"
    with Terminal() as terminal:
        terminal.configure()
        terminal.write("handler.py", python)
        pack, start, ask = commands.splitlines()
        terminal.type(pack)
        terminal.start_server(start)
        assert terminal.type(ask) == answer.strip()
