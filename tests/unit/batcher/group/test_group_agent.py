"""The words that torchrun's agent of a group is started with."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from wsgi_ts.batcher.group.agent import torchrun_arguments
from wsgi_ts.models.model_yaml import TorchrunOptions


def words(**options: Any) -> dict[str, str]:
    """The arguments for these options of the model's file, by name."""
    arguments = torchrun_arguments(dataclasses.asdict(TorchrunOptions(nproc_per_node=2, **options)), "m_29500")
    return {name.removeprefix("--"): value for name, _, value in (each.partition("=") for each in arguments)}


def test_groups_of_one_machine_meet_at_a_port_that_the_system_picks() -> None:
    given = words()
    assert (given["rdzv-endpoint"], given["rdzv-backend"], given["rdzv-id"]) == ("localhost:0", "c10d", "m_29500")
    assert (given["nnodes"], given["nproc-per-node"]) == ("1", "2")
    assert not {"node-rank", "master-addr"} & given.keys()
    # Its thread would be awake now and then, perhaps just when a rank is forked.
    assert given["rdzv-conf"] == "keep_alive_interval=1000000"
    assert words(rdzv_conf="join_timeout=60")["rdzv-conf"] == "keep_alive_interval=1000000,join_timeout=60"


def test_a_group_is_never_started_again_by_torchrun() -> None:
    assert words()["max-restarts"] == "0"


@pytest.mark.parametrize(("conf", "given"), [(None, ""), ("join_timeout=60", ",join_timeout=60")])
def test_several_machines_meet_where_the_file_says(conf: str | None, given: str) -> None:
    arguments = words(nnodes=2, rdzv_endpoint="head:29400", rdzv_conf=conf, node_rank=1)
    assert (arguments["rdzv-endpoint"], arguments["node-rank"]) == ("head:29400", "1")
    # What the file says comes last, and counts.
    assert arguments["rdzv-conf"] == f"keep_alive_interval=1,keep_alive_max_attempt=5{given}"


def test_a_static_rendezvous_is_at_the_masters_port() -> None:
    arguments = words(rdzv_backend="static", master_addr="head", master_port=1234)
    assert (arguments["master-addr"], arguments["master-port"]) == ("head", "1234")
    assert "rdzv-endpoint" not in arguments


#: Ranks that say when they are through the gate, and a watch: in an interpreter of its own, since hooks of forks stay.
FORKS = """
import json, os, sys, time
from wsgi_ts.batcher.group.agent import RankGate
reading, writing = os.pipe()
events = []
gate = RankGate(3, lambda: events.append("open"))
for number in range(3):
    time.sleep(0.1)
    events.append(f"fork {number}")
    last = time.monotonic()
    if os.fork() == 0:
        gate.pass_through()
        os.write(writing, f"{number} {time.monotonic()}\\n".encode())
        for _ in range(3):  # what a handler forks is not counted
            if os.fork() == 0:
                os._exit(0)
        os._exit(len(events) != number + 1)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)]
os.close(writing)
passed = [line.split() for line in os.fdopen(reading)]
late_enough = all(float(moment) > last for _, moment in passed)
print(json.dumps([events, codes, sorted(int(number) for number, _ in passed), late_enough]))
"""


def test_ranks_and_watch_begin_when_the_last_rank_is_forked() -> None:
    """A fork made while another thread holds a lock waits for it for ever."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True, timeout=300)
    events, codes, passed, late_enough = json.loads(done.stdout)
    assert events == ["fork 0", "fork 1", "fork 2", "open"]
    assert (codes, passed, late_enough) == ([0, 0, 0], [0, 1, 2], True)


def test_ranks_whose_agent_has_ended_before_all_were_there_end() -> None:
    code = """
import os, time
from wsgi_ts.batcher.group.agent import RankGate
gate = RankGate(2, lambda: None)
reading, writing = os.pipe()
if os.fork() == 0:
    gate.pass_through()
    os.write(writing, b"went on")
    os._exit(0)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout, done.stderr) == ("", "")
