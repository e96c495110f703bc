"""A model whose group spans two machines: two servers of this machine stand for them (`torchrun.nnodes: 2`)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import WITH_TORCH, ServerProcess, free_ports

pytestmark = pytest.mark.slow

HANDLER = """
import json, os
import torch
import torch.distributed as dist

class Handler:
    def initialize(self, context):
        dist.init_process_group("gloo")
        self.met = torch.ones(1)
        dist.all_reduce(self.met)

    def handle(self, data, context):
        words = [bytes(row["body"]).decode() for row in data]
        if "together" in words:
            total = torch.tensor([float(len(words[0]))])
            dist.all_reduce(total)
            return [str(total.item())] * len(words)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        place = {name: int(os.environ[name]) for name in names}
        return [json.dumps({"met": self.met.item(), "pid": os.getpid(), **place})] * len(words)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[ServerProcess]]:
    """Two servers with the model registered on both."""
    (port,) = free_ports(1)
    torchrun = {"nnodes": 2, "nproc-per-node": 2, "rdzv-endpoint": f"127.0.0.1:{port}", "OMP_NUMBER_THREADS": 1}
    settings = {"minWorkers": 1, "maxWorkers": 1, "parallelType": "tp", "responseTimeout": 10, "torchrun": torchrun}
    with ServerProcess(config=WITH_TORCH) as first, ServerProcess(config=WITH_TORCH) as second:
        for node in (first, second):
            archive(node.store, "wide", HANDLER, config_yaml=json.dumps(settings))
        with ThreadPoolExecutor(2) as pool:
            # Neither can load without the other.
            replies = list(pool.map(lambda node: node.register("wide.mar"), (first, second)))
        assert [reply.status for reply in replies] == [200, 200]
        yield [first, second]


def ask_all(nodes: list[ServerProcess], word: str) -> list[http.Reply]:
    """The nodes' answers to a request that is sent to all of them at the same time."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(lambda node: node.predict("wide", word), nodes))


def place(node: ServerProcess) -> dict[str, int]:
    """What rank 0 of a node says of its place."""
    reply = node.predict("wide", "where")
    assert reply.status == 200, reply.text
    return dict(reply.json())


def test_ranks_are_numbered_across_the_nodes_and_each_node_answers(nodes: list[ServerProcess]) -> None:
    places = sorted((place(node) for node in nodes), key=lambda each: each["RANK"])
    assert [each["RANK"] for each in places] == [0, 2]
    assert [each["GROUP_RANK"] for each in places] == [0, 1]
    for each in places:
        assert (each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"], each["WORLD_SIZE"], each["met"]) == (0, 2, 4, 4.0)


def test_a_collective_over_the_nodes_waits_for_the_other_nodes_request(nodes: list[ServerProcess]) -> None:
    replies = ask_all(nodes, "together")
    assert [(reply.status, reply.text) for reply in replies] == [(200, "32.0")] * 2


def test_a_dead_rank_of_one_node_has_both_started_again(nodes: list[ServerProcess]) -> None:
    before = [place(node)["pid"] for node in nodes]
    os.kill(before[1], signal.SIGKILL)

    def both_are_new() -> bool:
        replies = ask_all(nodes, "where")
        return all(each.status == 200 for each in replies) and not {each.json()["pid"] for each in replies} & {*before}

    eventually(both_are_new, within=90, what="new ranks on both nodes")
    assert sorted(place(node)["RANK"] for node in nodes) == [0, 2]
