"""A machine with several devices: one batcher each. The GPUs are told by an `nvidia-smi` of the test's own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import faults
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--query-gpu=index*) printf '0\\n1\\n' ;;
  *) printf '0, 0, 0, 0\\n' ;;
esac
"""
WHERE = """
class Where:
    def initialize(self, context):
        self.gpu = context.system_properties["gpu_id"]
    def handle(self, data, context):
        return [str(self.gpu)] * len(data)
"""


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that believes in two GPUs, with a model that tells on which one it runs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    archive(store, "where", WHERE)
    archive(store, "oncpu", WHERE, config_yaml="deviceType: cpu\n")
    environment = {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    with ServerProcess(store=store, environment=environment, config={"batch_policy": "none"}) as server:
        yield server


def ask(server: ServerProcess, model: str, count: int = 60) -> Counter[str]:
    """Which device answered how many of so many concurrent requests."""
    with ThreadPoolExecutor(8) as pool:
        return Counter(pool.map(lambda _: server.predict(model, b"x").text, range(count)))


def test_every_device_has_a_batcher_and_workers_go_round(server: ServerProcess) -> None:
    assert len(server.processes("batcher")) == 3
    assert server.register("where.mar", initial_workers=4).status == 200
    workers = server.request("management", "GET", "/models/where").json()[0]["workers"]
    assert [worker["gpu"] for worker in workers] == [True] * 4
    answers = ask(server, "where")
    assert set(answers) == {"0", "1"}
    assert sum(answers.values()) == 60
    assert server.register("oncpu.mar", initial_workers=1).status == 200
    assert set(ask(server, "oncpu", 5)) == {"None"}


def test_the_death_of_one_devices_batcher_leaves_the_others(server: ServerProcess) -> None:
    server.register("where.mar", initial_workers=2)
    assert set(ask(server, "where")) == {"0", "1"}
    faults.kill(server, "batcher")
    eventually(lambda: len(server.processes("batcher")) == 3, within=5)
    eventually(lambda: set(ask(server, "where")) == {"0", "1"}, within=15, what="answers of both devices")


VISIBLE = """
import os
class Visible:
    def initialize(self, context):
        self.answer = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    def handle(self, data, context):
        return [self.answer] * len(data)
"""


def test_a_worker_with_several_gpus_sees_the_next_ones_of_its_list(server: ServerProcess) -> None:
    store = server.store
    both = "parallelType: custom\nparallelLevel: 2\n"
    archive(store, "pair", VISIBLE, config_yaml=both)
    archive(store, "turned", VISIBLE, config_yaml="parallelType: custom\nparallelLevel: 1\ndeviceIds: [1, 0]\n")
    archive(store, "three", VISIBLE, config_yaml="parallelType: custom\nparallelLevel: 3\n")
    assert server.register("pair.mar", initial_workers=4).status == 200
    described = server.request("management", "GET", "/models/pair").json()[0]
    assert [(worker["id"], worker["gpuIds"]) for worker in described["workers"]] == [("29500", [0, 1])]
    assert server.predict("pair", b"").text == "0,1"
    assert server.register("turned.mar", initial_workers=2).status == 200
    assert set(ask(server, "turned")) == {"0", "1"}
    refused = server.register("three.mar", initial_workers=1)
    assert (refused.status, refused.json()["type"]) == (500, "WorkerInitializationException")
    text = refused.json()["message"]
    assert text.startswith("No enough gpu devices for model:three parallelLevel:3")
    assert "pair 1.0 worker 29500" in text
