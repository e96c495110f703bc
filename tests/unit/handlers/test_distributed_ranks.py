"""Models that span several processes, each a rank over gloo, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.server import REPOSITORY, free_ports

#: What lets an ill-matched torchvision be imported, which transformers looks for.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
SCRIPT = Path(__file__).with_name("distributed_ranks.py")
NEAR = 1e-5


def run(case: str, ranks: int) -> dict[str, Any]:
    """Runs a case on so many ranks and returns what rank 0 found."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(ranks), "PYTHONPATH": f"{SITE}{os.pathsep}{REPOSITORY}"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, case],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * ranks, [errors[-2000:] for _, errors in outputs]
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), [("pp", 2), ("pp-chunks", 4)])
def test_rank_0_calls_and_the_others_follow(case: str, ranks: int) -> None:
    found = run(case, ranks)
    assert found["first"] < NEAR
    assert found["failure"].startswith("IndexError")
    assert found["again"] < NEAR
    assert found["by_position"] < NEAR
    assert found["longest"] < 65536


@pytest.mark.slow
def test_an_error_of_another_stage_reaches_the_caller() -> None:
    found = run("last-fails", 3)
    assert found["failure"].startswith("stage 2 of the model: RuntimeError: ")
    assert found["again"] < NEAR


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), [("tp", 2), ("tp", 4), ("pptp", 4)])
def test_every_rank_calls_and_has_the_result(case: str, ranks: int) -> None:
    assert run(case, ranks)["worst"] < NEAR


@pytest.mark.slow
def test_a_plan_of_ones_own() -> None:
    found = run("planned", 2)
    assert found["worst"] < NEAR
    # Of six blocks: half of three matrices of 48 x 16 and of two biases of 48. A row-wise bias of 16 is on both.
    assert found["own"] == 6 * (3 * 48 * 16 // 2 + 2 * 48 // 2 + 16)


@pytest.mark.slow
def test_generate_of_transformers() -> None:
    found = run("generated", 2)
    assert "cache cannot be reordered" in found.pop("error")
    assert found == {"likeliest": True, "drawn": True, "penalty": True, "beams": True, "again": True}
