"""What programs of users count on: handlers that read flags, scripts that look for TorchServe's server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import WITH_TORCH, ServerProcess

from wsgi_ts.process import command_line

#: As a training script that became a handler: its flags have their defaults.
FLAGS = """
import argparse, os, sys

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
options = parser.parse_args()

class Handler:
    def initialize(self, context):
        self.folder = os.path.realpath(context.system_properties["model_dir"])

    def handle(self, data, context):
        program = os.path.realpath(sys.argv[0])
        return [f"{options.device} {os.path.relpath(program, self.folder)}"] * len(data)
"""
GROUP = "parallelType: tp\nminWorkers: 1\nmaxWorkers: 1\ntorchrun: {nproc-per-node: 2}\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "forked", FLAGS)
    archive(store, "own", FLAGS, config_yaml="useVenv: true\n")
    archive(store, "group", FLAGS, config_yaml=GROUP)
    cache = tmp_path_factory.mktemp("cache")
    with ServerProcess(store=store, config=WITH_TORCH, environment={"XDG_CACHE_HOME": str(cache)}) as running:
        yield running


@pytest.mark.parametrize("model", ["forked", "own", "group"])
def test_a_handler_that_parses_flags_finds_none(server: ServerProcess, model: str) -> None:
    reply = server.register(f"{model}.mar")
    assert reply.status == 200, server.log("model_log.log")[-2000:]
    answer = eventually(lambda: server.predict(model), within=30, what=model)
    assert answer.text == "cpu handler.py"


def test_one_process_is_known_by_torchserves_name(server: ServerProcess) -> None:
    known = [each.pid for each in server.processes() if "org.pytorch.serve.ModelServer" in command_line(each.pid)]
    assert known == [int((server.home / "tmp" / ".model_server.pid").read_text())]
