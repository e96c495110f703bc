"""Models whose workers span several processes: torchrun groups on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

TENSOR_PARALLEL = """
import json, os, time
import torch
import torch.distributed as dist

class Handler:
    def initialize(self, context):
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.calls = 0
        if context.model_yaml_config.get("handler", {}).get("fails_on") == self.rank:
            raise ValueError("this rank cannot load")

    def handle(self, data, context):
        self.calls += 1
        words = [bytes(row["body"]).decode() for row in data]
        if f"raise on {self.rank}" in words or "raise" in words:
            raise ValueError("asked to")
        if f"exit on {self.rank}" in words:
            os._exit(7)
        if f"hang on {self.rank}" in words:
            time.sleep(3600)
        total = torch.tensor([float(len(word)) for word in words])
        dist.all_reduce(total)
        return [json.dumps({"word": word, "sum": value, "rank": self.rank, "pid": os.getpid()})
                for word, value in zip(words, total.tolist())]
"""


def config_yaml(**more: object) -> str:
    """The model-config.yaml of a group of three ranks."""
    keys = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 4, "parallelType": "tp", "responseTimeout": 6} | more
    keys.setdefault("torchrun", {"nproc-per-node": 3, "OMP_NUMBER_THREADS": 1})
    return json.dumps(keys)


def ranks_of(server: ServerProcess) -> list[int]:
    """The pids of all ranks, by rank."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        variables = dict(item.partition(b"=")[::2] for item in environ)
        if variables.get(b"WSGI_TS_WORKER", b"").decode().endswith(server.prefix) and b"RANK" in variables:
            found[int(variables[b"RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "tp", TENSOR_PARALLEL, config_yaml=config_yaml())
    archive(store, "broken", TENSOR_PARALLEL, config_yaml=config_yaml(handler={"fails_on": 2}))
    archive(store, "both", TENSOR_PARALLEL, config_yaml=config_yaml(parallelLevel=2))
    with ServerProcess(store=store) as server:
        assert server.register("tp.mar").status == 200
        yield server


def answer(server: ServerProcess, word: str) -> dict[str, object]:
    """The tp model's answer to a word."""
    reply = server.predict("tp", word)
    assert reply.status == 200, reply.text
    return dict(reply.json())


def test_every_rank_gets_the_request_and_rank_0_answers(server: ServerProcess) -> None:
    assert len(ranks_of(server)) == 3
    body = answer(server, "hello")
    assert (body["word"], body["sum"], body["rank"]) == ("hello", 15.0, 0)
    assert body["pid"] == ranks_of(server)[0]
    described = server.request("management", "GET", "/models/tp").json()[0]
    assert (described["parallelType"], described["parallelLevel"]) == ("tp", 3)
    assert [worker["id"] for worker in described["workers"]] == ["29500"]


def test_a_large_body_reaches_every_rank(server: ServerProcess) -> None:
    assert answer(server, "x" * 2_000_000)["sum"] == 6_000_000.0


def test_all_ranks_raising_is_an_error_of_the_batch_alone(server: ServerProcess) -> None:
    before = ranks_of(server)
    reply = server.predict("tp", "raise")
    assert (reply.status, reply.json()["message"]) == (503, "Prediction failed")
    assert answer(server, "after")["sum"] == 15.0
    assert ranks_of(server) == before


@pytest.mark.parametrize("word", ["raise on 0", "raise on 1", "exit on 2", "hang on 1"])
@pytest.mark.slow
def test_ranks_out_of_step_end_the_group_and_it_comes_back(server: ServerProcess, word: str) -> None:
    before = ranks_of(server)
    reply = server.predict("tp", word)
    assert reply.status in (500, 503)
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)
    after = ranks_of(server)
    assert len(after) == 3
    assert not set(after) & set(before)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.slow
def test_a_killed_rank_takes_the_group_along(server: ServerProcess, rank: int) -> None:
    before = ranks_of(server)
    os.kill(before[rank], signal.SIGKILL)
    eventually(lambda: not set(before) & set(ranks_of(server)), within=5, what="the old ranks gone")
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)


def test_one_rank_that_cannot_load_fails_the_registration(server: ServerProcess) -> None:
    reply = server.register("broken.mar")
    assert reply.status == 500
    assert "Failed to start workers for model broken" in reply.json()["message"]
    assert len(ranks_of(server)) == 3


def test_both_ways_to_say_the_number_of_processes_is_an_error(server: ServerProcess) -> None:
    reply = server.register("both.mar")
    assert (reply.status, reply.json()["type"]) == (400, "InvalidModelException")
    assert "parallelLevel and torchrun.nproc-per-node" in reply.json()["message"]


def test_unregistering_leaves_no_rank(server: ServerProcess) -> None:
    assert server.request("management", "DELETE", "/models/tp").status == 200
    eventually(lambda: ranks_of(server) == [], within=5)
