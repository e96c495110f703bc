"""Models whose workers span several processes: torchrun groups on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import WITH_TORCH, ServerProcess, free_ports

TENSOR_PARALLEL = """
import json, os, subprocess, tempfile, time
import torch
import torch.distributed as dist

class Handler:
    def initialize(self, context):
        dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.calls = 0
        options = context.model_yaml_config.get("handler", {})
        if options.get("fails_on") == self.rank:
            raise ValueError("this rank cannot load")
        if options.get("meet"):
            dist.all_reduce(torch.ones(1))
        time.sleep(options.get("load_s", 0))
        if options.get("helpers"):
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            if os.fork() == 0:
                os.setsid()
                time.sleep(1000)

    def handle(self, data, context):
        self.calls += 1
        words = [bytes(row["body"]).decode() for row in data]
        if "raise late" in words and self.rank == 2:
            time.sleep(6)
        if f"raise on {self.rank}" in words or "raise" in words or "raise late" in words:
            raise ValueError("asked to")
        if f"exit on {self.rank}" in words:
            os._exit(7)
        if f"leave on {self.rank}" in words:
            os._exit(0)
        if f"hang on {self.rank}" in words:
            open(os.path.join(tempfile.gettempdir(), "hangs"), "w").close()
            time.sleep(3600)
        total = torch.tensor([float(len(word)) for word in words])
        dist.all_reduce(total)
        return [json.dumps({"word": word, "sum": value, "rank": self.rank, "pid": os.getpid()})
                for word, value in zip(words, total.tolist())]
"""


def config_yaml(**more: object) -> str:
    """The model-config.yaml of a group of three ranks."""
    keys = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 4, "parallelType": "tp", "responseTimeout": 12} | more
    keys.setdefault("torchrun", {"nproc-per-node": 3, "OMP_NUMBER_THREADS": 1})
    return json.dumps(keys)


def ranks_of(server: ServerProcess, model: str = "tp") -> list[int]:
    """The pids of all ranks of a model, by rank."""
    title = rf"wsgi-ts: rank (\d+) of \d+ {model} "
    titles = [(re.match(title, each.command), each.pid) for each in server.processes()]
    return [pid for _, pid in sorted((int(found[1]), pid) for found, pid in titles if found)]


def agent_of(server: ServerProcess, model: str = "tp") -> int:
    """The pid of torchrun's agent of a model with one group."""
    (pid,) = [each.pid for each in server.processes() if re.match(rf"wsgi-ts: group \d+ {model} ", each.command)]
    return pid


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "tp", TENSOR_PARALLEL, config_yaml=config_yaml())
    archive(store, "broken", TENSOR_PARALLEL, config_yaml=config_yaml(handler={"fails_on": 2}))
    waits = {"fails_on": 1, "meet": True}
    archive(store, "uneven", TENSOR_PARALLEL, config_yaml=config_yaml(handler=waits, startupTimeout=3600))
    archive(store, "slow", TENSOR_PARALLEL, config_yaml=config_yaml(handler={"load_s": 3600}, startupTimeout=3600))
    archive(store, "patient", TENSOR_PARALLEL, config_yaml=config_yaml(responseTimeout=3600))
    archive(store, "helpers", TENSOR_PARALLEL, config_yaml=config_yaml(handler={"helpers": True}))
    archive(store, "both", TENSOR_PARALLEL, config_yaml=config_yaml(parallelLevel=2, torchrun={"nproc-per-node": 1}))
    with ServerProcess(store=store, config=WITH_TORCH) as server:
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


@pytest.mark.parametrize("word", ["raise", "raise late"])
def test_all_ranks_raising_is_an_error_of_the_batch_alone(server: ServerProcess, word: str) -> None:
    """Also where one of them is held up for some seconds."""
    before = ranks_of(server)
    reply = server.predict("tp", word)
    assert (reply.status, reply.json()["message"]) == (503, "Prediction failed")
    assert answer(server, "after")["sum"] == 15.0
    assert ranks_of(server) == before


@pytest.mark.parametrize("word", ["raise on 0", "raise on 1", "exit on 2", "leave on 1", "hang on 1"])
@pytest.mark.slow
def test_ranks_out_of_step_end_the_group_and_it_comes_back(server: ServerProcess, word: str) -> None:
    before = ranks_of(server)
    reply = server.predict("tp", word)
    assert reply.status in (500, 503)
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)
    eventually(lambda: len(ranks_of(server)) == 3, within=5, what="the old ranks gone")
    assert not set(ranks_of(server)) & set(before)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.slow
def test_a_killed_rank_takes_the_group_along(server: ServerProcess, rank: int) -> None:
    before = ranks_of(server)
    os.kill(before[rank], signal.SIGKILL)
    eventually(lambda: not set(before) & set(ranks_of(server)), within=5, what="the old ranks gone")
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)


@pytest.mark.slow
def test_a_killed_agent_takes_the_ranks_and_the_batch_along(server: ServerProcess) -> None:
    """Long before the request's time is over."""
    assert server.register("patient.mar").status == 200
    before = ranks_of(server, "patient")
    hangs = server.home / "tmp" / "hangs"
    hangs.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.predict, "patient", "hang on 1")
        eventually(hangs.exists, within=10, what="the rank that hangs")
        os.kill(agent_of(server, "patient"), signal.SIGKILL)
        eventually(lambda: not set(before) & set(ranks_of(server, "patient")), within=2, what="the old ranks gone")
        assert reply.result().status in (500, 507)
    eventually(lambda: server.predict("patient", "back").status == 200, within=60)
    assert server.request("management", "DELETE", "/models/patient").status == 200


@pytest.mark.slow
def test_a_stopped_agent_is_in_nobodys_way(server: ServerProcess) -> None:
    agent, before = agent_of(server), ranks_of(server)
    os.kill(agent, signal.SIGSTOP)
    assert answer(server, "hello")["sum"] == 15.0
    # Now there is nobody to see that a rank dies, until a request finds out.
    os.kill(before[1], signal.SIGKILL)
    assert server.predict("tp", "hello").status in (500, 503, 507)
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)
    gone = {agent, *before}
    eventually(lambda: not gone & {each.pid for each in server.processes()}, within=5, what="the old ones gone")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.slow
def test_a_rank_stopped_in_a_collective_is_found_at_the_response_timeout(server: ServerProcess, rank: int) -> None:
    before = ranks_of(server)
    os.kill(before[rank], signal.SIGSTOP)
    # What the stopped rank 0 had not begun is served by the next group, anything else is an error.
    assert server.predict("tp", "hello").status in ((200,) if rank == 0 else (500,))
    eventually(lambda: server.predict("tp", "back").status == 200, within=60)
    eventually(lambda: not set(ranks_of(server)) & set(before), within=5, what="the old ranks gone")


@pytest.mark.slow
def test_what_ranks_leave_running_goes_with_them(server: ServerProcess) -> None:
    assert server.register("helpers.mar").status == 200

    def family() -> set[int]:
        """The ranks, the forks, which have the ranks' titles, and the programs."""
        programs = {each.pid for each in server.processes() if each.command == "sleep 1000"}
        return programs | set(ranks_of(server, "helpers"))

    # Three ranks, each with a program and a fork that left their session.
    eventually(lambda: len(family()) == 9, within=5, what="all of them")
    before = family()
    os.kill(agent_of(server, "helpers"), signal.SIGKILL)
    eventually(lambda: not before & family(), within=5, what="the old ones gone")
    eventually(lambda: server.predict("helpers", "back").status == 200, within=60)
    eventually(lambda: len(family()) == 9, within=5, what="all of the new ones")
    assert server.request("management", "DELETE", "/models/helpers").status == 200


def test_a_rank_that_cannot_load_does_not_let_the_others_wait_for_it(server: ServerProcess) -> None:
    # An answer comes long before the startup timeout.
    assert server.register("uneven.mar").status == 500
    eventually(lambda: ranks_of(server, "uneven") == [], within=5)


@pytest.mark.parametrize("how", ["scale", "unregister"])
def test_a_group_can_be_sent_away_while_it_loads(server: ServerProcess, how: str) -> None:
    assert server.register("slow.mar", synchronous="false").status == 202
    eventually(lambda: len(ranks_of(server, "slow")) == 3, within=20, what="ranks that load")
    if how == "scale":
        scaled = server.request("management", "PUT", "/models/slow?min_worker=0&max_worker=0&synchronous=true")
        assert scaled.status == 200
        eventually(lambda: ranks_of(server, "slow") == [], within=5)
    assert server.request("management", "DELETE", "/models/slow").status == 200
    eventually(lambda: ranks_of(server, "slow") == [], within=5)


@pytest.mark.slow
def test_a_server_can_be_stopped_while_a_group_loads() -> None:
    with ServerProcess(config=WITH_TORCH) as server:
        archive(server.store, "slow", TENSOR_PARALLEL, config_yaml=config_yaml(handler={"load_s": 3600}))
        assert server.register("slow.mar", synchronous="false").status == 202
        eventually(lambda: len(ranks_of(server, "slow")) == 3, within=20, what="ranks that load")
        assert server.stop() == []


@pytest.mark.slow
def test_ranks_of_another_interpreter_are_watched_just_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with ServerProcess(config={"python": str(python)}) as server:
        archive(server.store, "tp", TENSOR_PARALLEL, config_yaml=config_yaml())
        assert server.register("tp.mar").status == 200
        assert answer(server, "hello")["sum"] == 15.0
        before = ranks_of(server)
        assert len(before) == 3
        os.kill(before[1], signal.SIGKILL)
        eventually(lambda: not set(before) & set(ranks_of(server)), within=5, what="the old ranks gone")
        eventually(lambda: server.predict("tp", "back").status == 200, within=60)


def test_a_rendezvous_port_that_is_taken_fails_the_registration(server: ServerProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        torchrun = {"nproc-per-node": 2, "rdzv-endpoint": f"127.0.0.1:{taken.getsockname()[1]}"}
        settings = config_yaml(torchrun=torchrun, startupTimeout=3)
        archive(server.store, "taken", TENSOR_PARALLEL, config_yaml=settings)
        assert server.register("taken.mar").status == 500
    eventually(lambda: ranks_of(server, "taken") == [], within=5)
    assert answer(server, "hello")["sum"] == 15.0


def test_ranks_can_meet_at_a_fixed_port(server: ServerProcess) -> None:
    (port,) = free_ports(1)
    where = {"rdzv-backend": "static", "master-addr": "127.0.0.1", "master-port": port}
    archive(server.store, "fixed", TENSOR_PARALLEL, config_yaml=config_yaml(torchrun={"nproc-per-node": 2, **where}))
    assert server.register("fixed.mar").status == 200
    assert server.predict("fixed", "hello").json()["sum"] == 10.0
    assert server.request("management", "DELETE", "/models/fixed").status == 200


@pytest.mark.slow
def test_twenty_groups_that_start_together_all_start(server: ServerProcess) -> None:
    settings = config_yaml(
        **{"minWorkers": 20, "maxWorkers": 20, "handler": {"meet": True}, "startupTimeout": 600},
        torchrun={"nproc-per-node": 2, "OMP_NUMBER_THREADS": 1},
    )
    archive(server.store, "many", TENSOR_PARALLEL, config_yaml=settings)
    assert server.register("many.mar", initial_workers=20).status == 200
    assert len(ranks_of(server, "many")) == 40
    (described,) = server.request("management", "GET", "/models/many").json()
    assert [worker["status"] for worker in described["workers"]] == ["READY"] * 20
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: server.predict("many", "x" * number), range(1, 101)))
    # Were a group connected with another one's ranks, sums would be wrong.
    assert [reply.json()["sum"] for reply in replies] == [2.0 * number for number in range(1, 101)]
    assert server.request("management", "DELETE", "/models/many").status == 200


def test_one_rank_that_cannot_load_fails_the_registration(server: ServerProcess) -> None:
    reply = server.register("broken.mar")
    assert reply.status == 500
    assert "Failed to start workers for model broken" in reply.json()["message"]
    assert len(ranks_of(server)) == 3


def test_of_both_ways_to_say_the_number_of_processes_that_of_torchrun_counts(server: ServerProcess) -> None:
    assert server.register("both.mar").status == 200
    assert len(ranks_of(server, "both")) == 1
    told = r"parallelLevel.*: torchrun\.nproc-per-node, 1, counts instead"
    eventually(lambda: re.search(rf"\[WARN \] .*{told}", server.log()), within=5)
    assert server.request("management", "DELETE", "/models/both").status == 200


def test_unregistering_leaves_no_rank(server: ServerProcess) -> None:
    assert server.request("management", "DELETE", "/models/tp").status == 200
    eventually(lambda: ranks_of(server) == [], within=5)
