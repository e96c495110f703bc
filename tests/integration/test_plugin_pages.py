"""The commands of the page on plugins, typed; and the examples for endpoints, byte for byte."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.archives import archive
from support.server import REPOSITORY
from support.terminal import Terminal

from wsgi_ts.plugins.testing import PluginServer

PAGE = REPOSITORY / "docs" / "plugins.md"
EXAMPLES = REPOSITORY / "examples" / "plugins"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands need curl")
def test_the_page_typed() -> None:
    first, *others = blocks("python")
    assert first == (EXAMPLES / "model_ready.py").read_text(encoding="utf-8")
    assert len(first.splitlines()) <= 12
    with Terminal() as terminal:
        terminal.configure(preload_modules="")
        (terminal.home / "store").mkdir()
        archive(terminal.home / "store", "echo")
        terminal.write("plugins/model_ready.py", first)
        for number, text in enumerate(others):
            if "def test_" not in text:
                terminal.write(f"others/example_{number}.py", text)
        shutil.copytree(EXAMPLES, terminal.home / "examples" / "plugins")
        answers = []
        for command in [line for block in blocks("bash") for line in block.splitlines()]:
            if command.startswith("torchserve --start"):
                terminal.start_server(command)
                terminal.wait_for_workers("echo")
            else:
                answers.append(terminal.type(command))
        ready, listed, as_json, over_http, doctor, new, measured = answers
        assert '"ready"' in ready
        for text in (listed, as_json, over_http):
            assert "model-ready" in text and "web worker inference" in text
        assert re.search(r"^OK +plugin model-ready +endpoints, from ", doctor, re.MULTILINE)
        assert "Wrote" in new and "gain" in measured
        # The other pieces of Python on the page are plugins, too.
        shown = terminal.type("wsgi-ts plugins --plugins-path others --run-dir /tmp/not-there")
        assert shown.count("can be loaded") == 5 and "failed" not in shown


@pytest.fixture(scope="module")
def sagemaker(tmp_path_factory: pytest.TempPathFactory) -> PluginServer:
    return PluginServer(tmp_path_factory.mktemp("sagemaker") / "server", EXAMPLES / "sagemaker.py")


def test_sagemaker_as_torchserve_s_plugin_answers(sagemaker: PluginServer) -> None:
    server = sagemaker
    server.start()
    try:
        ping = server.get("/ping")
        assert (ping.status, ping.body) == (200, b'{\n\t"Status": "Healthy"\n}\n')
        parameters = server.get("/execution-parameters")
        assert (parameters.status, parameters.body) == (
            200,
            b'{\n  "MaxConcurrentTransforms": 1,\n  "BatchStrategy": "MULTI_RECORD",\n  "MaxPayloadInMB": 6\n}',
        )
        invoked = server.post("/invocations", b"record", headers={"content-type": "application/octet-stream"})
        assert (invoked.status, invoked.body) == (200, b"record")
        assert server.request("DELETE", "/models/echo", api="management").status == 200
        nothing = server.post("/invocations", b"record")
        assert (nothing.status, nothing.json()["type"]) == (503, "ModelServerEndpointException")
        assert server.get("/ping").status == 200  # it was ready once
    finally:
        assert server.stop() == 0


def test_sagemaker_before_a_model_is_loaded_and_with_several(tmp_path: Path) -> None:
    server = PluginServer(tmp_path / "server", EXAMPLES / "sagemaker.py", environment={"NUM_WORKERS": "3"})
    (server.home / "store" / "echo.mar").rename(server.home / "store" / "echo.zip")
    server.start(wait_for_model=False)
    try:
        ping = server.get("/ping")
        assert (ping.status, ping.body) == (503, b"Models are not loaded")
        assert server.get("/execution-parameters").json()["MaxConcurrentTransforms"] == 3
    finally:
        assert server.stop() == 0


def test_sagemaker_serving_many_models(tmp_path: Path) -> None:
    server = PluginServer(tmp_path / "server", EXAMPLES / "sagemaker.py", environment={"SAGEMAKER_MULTI_MODE": "true"})
    server.start()
    try:
        ping = server.get("/ping")
        assert (ping.status, ping.body) == (503, b"Service file unavailable")
    finally:
        assert server.stop() == 0
