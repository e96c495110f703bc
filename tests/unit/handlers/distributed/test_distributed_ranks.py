"""Models that span several processes, each a rank over gloo, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.server import REPOSITORY, free_ports

#: What lets an ill-matched torchvision be imported, which transformers looks for.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
SCRIPT = Path(__file__).with_name("distributed_ranks.py")
NEAR = 1e-5


class Ranks:
    """A process that has imported what ranks need, and forks them."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self._process = process
        self._errors = errors

    def run(self, case: str, ranks: int) -> dict[str, Any]:
        """Runs a case on so many ranks and returns what rank 0 found."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{case} {ranks} {free_ports(1)[0]}\n")
        self._process.stdin.flush()
        found: dict[str, Any] = {}
        for line in self._process.stdout:
            value = json.loads(line)
            if isinstance(value, list):
                assert value == [0] * ranks, self._errors.read_text()[-4000:]
                return found
            found = value
        raise AssertionError(self._errors.read_text()[-4000:])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    errors = tmp_path_factory.mktemp("ranks") / "stderr"
    variables = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SITE}{os.pathsep}{REPOSITORY}"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        errors.open("wb") as stderr,
        subprocess.Popen([sys.executable, SCRIPT], env=os.environ | variables, stderr=stderr, **pipes) as process,
    ):
        yield Ranks(process, errors)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("pp", 2), ("pp-chunks", 4)])
def test_rank_0_calls_and_the_others_follow(ranks: Ranks, case: str, count: int) -> None:
    found = ranks.run(case, count)
    assert found["first"] < NEAR
    assert found["failure"].startswith("IndexError")
    assert found["again"] < NEAR
    assert found["by_position"] < NEAR
    assert found["longest"] < 65536


@pytest.mark.slow
def test_an_error_of_another_stage_reaches_the_caller(ranks: Ranks) -> None:
    found = ranks.run("last-fails", 3)
    assert found["failure"].startswith("stage 2 of the model: RuntimeError: ")
    assert found["again"] < NEAR


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("tp", 2), ("tp", 4), ("pptp", 4)])
def test_every_rank_calls_and_has_the_result(ranks: Ranks, case: str, count: int) -> None:
    assert ranks.run(case, count)["worst"] < NEAR


@pytest.mark.slow
def test_a_plan_of_ones_own(ranks: Ranks) -> None:
    found = ranks.run("planned", 2)
    assert found["worst"] < NEAR
    # Of six blocks: half of three matrices of 48 x 16 and of two biases of 48. A row-wise bias of 16 is on both.
    assert found["own"] == 6 * (3 * 48 * 16 // 2 + 2 * 48 // 2 + 16)


@pytest.mark.slow
def test_generate_of_transformers(ranks: Ranks) -> None:
    found = ranks.run("generated", 2)
    assert "cache cannot be reordered" in found.pop("error")
    assert found == {"likeliest": True, "drawn": True, "penalty": True, "beams": True, "again": True}
