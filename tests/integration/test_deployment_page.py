"""The commands of docs/deployment.md, typed."""

from __future__ import annotations

import json
import re

from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY
from support.terminal import Terminal

PAGE = REPOSITORY / "docs" / "deployment.md"


def test_the_page() -> None:
    probes, serve, upgrade, doctor = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    with Terminal() as terminal:
        (terminal.home / "store").mkdir()
        archive(terminal.home / "store", "shout")
        terminal.configure(model_store="store", preload_modules="")
        terminal.start_server(f"{serve.strip()} >> terminal.log 2>&1 &")
        terminal.wait_for_workers("shout")
        eventually(lambda: terminal.request("8080", "GET", "/readyz").status == 200, within=20)
        answers = [json.loads(terminal.type(command)) for command in probes.splitlines()]
        assert answers == [{"live": True}, {"ready": True}, {"started": True}]
        assert re.fullmatch(r"Upgraded from (\S+) to \1\.\n", terminal.type(upgrade))
        eventually(lambda: json.loads(terminal.type(probes.splitlines()[1])) == {"ready": True}, within=20)
        found = terminal.type(doctor, status=1)
        assert "is out of reach for the service and for probes" in found


def test_the_files_that_the_page_names_are_there() -> None:
    links = re.findall(r"\]\(\.\./(deploy/[^)#]+)\)", PAGE.read_text())
    assert len(links) >= 7
    assert all((REPOSITORY / link).exists() for link in links)
