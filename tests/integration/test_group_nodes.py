"""A model whose group spans two machines (`torchrun.nnodes: 2`): two servers of this machine stand for them.

Where this process may make network namespaces, each of two servers also gets an address of its own.
"""

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
from support.machines import Machine, are_possible, two_machines
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


def settings(endpoint: str) -> str:
    """The model-config.yaml of a model that spans two nodes which meet there."""
    torchrun = {"nnodes": 2, "nproc-per-node": 2, "rdzv-endpoint": endpoint, "OMP_NUMBER_THREADS": 1}
    keys = {"minWorkers": 1, "maxWorkers": 1, "parallelType": "tp", "responseTimeout": 30, "torchrun": torchrun}
    return json.dumps(keys)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[ServerProcess]]:
    """Two servers with the model registered on both."""
    (port,) = free_ports(1)
    with ServerProcess(config=WITH_TORCH) as first, ServerProcess(config=WITH_TORCH) as second:
        for node in (first, second):
            archive(node.store, "wide", HANDLER, config_yaml=settings(f"127.0.0.1:{port}"))
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
        try:
            replies = ask_all(nodes, "where")
        except TimeoutError:
            return False
        return all(each.status == 200 for each in replies) and not {each.json()["pid"] for each in replies} & {*before}

    eventually(both_are_new, within=90, what="new ranks on both nodes")
    assert sorted(place(node)["RANK"] for node in nodes) == [0, 2]


@pytest.mark.skipif(not are_possible(), reason="network namespaces take root and ip")
def test_two_machines_with_a_cable_between_them() -> None:
    """Each has its own loopback: nothing can meet there by mistake."""
    with two_machines() as machines:
        servers: dict[Machine, ServerProcess] = {}
        try:
            for machine in machines:
                servers[machine] = machine.do(ServerProcess, config=WITH_TORCH)
                archive(servers[machine].store, "wide", HANDLER, config_yaml=settings(f"{machines[0].address}:29400"))
            for begun in [machine.begin(server.start) for machine, server in servers.items()]:
                begun.result()
            replies = [machine.begin(server.register, "wide.mar") for machine, server in servers.items()]
            assert [each.result().status for each in replies] == [200, 200], replies[0].result().text
            places = [machine.do(place, server) for machine, server in servers.items()]
            assert sorted(each["RANK"] for each in places) == [0, 2]
            assert all((each["WORLD_SIZE"], each["met"]) == (4, 4.0) for each in places)
            asked = [machine.begin(server.predict, "wide", "together") for machine, server in servers.items()]
            assert [(each.result().status, each.result().text) for each in asked] == [(200, "32.0")] * 2
        finally:
            left = [machine.do(server.stop) for machine, server in servers.items()]
    assert left == [[], []]
