"""What handlers do with transformers, with the oldest and the newest version that the extras admit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.server import REPOSITORY, free_ports

#: Both ends of the range, each with what it needs in another version than the other end. Their other requirements,
#: torch above all, are those of the running environment.
ENDS = [
    {"transformers": "4.48.0", "tokenizers": "0.21.4", "huggingface-hub": "0.36.0"},
    {"transformers": "5.24.0", "tokenizers": "0.23.3", "huggingface-hub": "2.4.0"},
]
#: What lets an ill-matched torchvision be imported, which transformers looks for.
SITE = REPOSITORY / "tests" / "support" / "torchvision_cpu"
HERE = Path(__file__).parent


def installed(packages: dict[str, str]) -> bool:
    """Whether the running environment has exactly these."""
    try:
        return all(importlib.metadata.version(name) == version for name, version in packages.items())
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module", params=ENDS, ids=lambda packages: packages["transformers"])
def variables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that imports one end of the range; it is downloaded."""
    if installed(request.param):
        pytest.skip("the running environment has it: the other tests have tried it")
    folder = tmp_path_factory.mktemp("site")
    wanted = [f"{name}=={version}" for name, version in request.param.items()]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    command = [*install, "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{', '.join(wanted)} cannot be had here: {done.stderr.strip().splitlines()[-1:]}")
    paths = [str(folder), str(SITE), str(REPOSITORY), str(REPOSITORY / "tests")]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(command: list[str], variables: dict[str, str], given: str = "") -> str:
    done = subprocess.run(command, env=os.environ | variables, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_extras_have_the_range_that_is_tried() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    oldest, newest = ([int(part) for part in end["transformers"].split(".")] for end in ENDS)
    for extra in ("text", "test"):
        lines = config["options.extras_require"][extra].split()
        (range_,) = (Requirement(line).specifier for line in lines if line.startswith("transformers"))
        assert range_ == Requirement(f"x>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}").specifier


@pytest.mark.slow
def test_generate_over_stages(variables: dict[str, str]) -> None:
    script = str(HERE.parent / "distributed" / "distributed_ranks.py")
    address = {"MASTER_ADDR": "127.0.0.1"}
    found, codes = run([sys.executable, script], variables | address, f"generated 2 {free_ports(1)[0]}\n").splitlines()
    assert codes == "[0, 0]"
    assert "false" not in found
    assert found.count("true") == 5


@pytest.mark.slow
def test_streams_and_names(variables: dict[str, str]) -> None:
    streams = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_handler_streamer.py")]
    assert "3 passed" in run(streams, variables)
    names = [sys.executable, str(HERE / "library_names_check.py"), "transformers", "huggingface_hub"]
    faults = json.loads(run(names, variables))
    assert len(faults) > 5
    assert set(faults.values()) == {""}, faults
