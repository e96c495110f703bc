"""The words that torchrun's agent of a group is started with."""

from __future__ import annotations

import dataclasses
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
    assert not {"rdzv-conf", "node-rank", "master-addr"} & given.keys()


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
