"""The locked versions: whole, exact, and within the ranges that users are told."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
LOCKS = sorted((REPOSITORY / "requirements").glob("python3.*.txt"))
#: vllm wants a torch of its own, and KServe's package versions of its own, which locks of its own name.
NOT_LOCKED = ("vllm", "kserve")


def requirements(*texts: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def locked(lock: Path) -> dict[str, str]:
    """Version by package of a lock file."""
    found = {}
    for requirement in requirements(lock.read_text()):
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, f"{lock.name}: {requirement} is not one version"
        found[canonicalize_name(requirement.name)] = pin.version
    return found


def asked() -> list[Requirement]:
    """All that the project's files ask for by name."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = [text for name, text in setup["options.extras_require"].items() if name not in NOT_LOCKED]
    return requirements(
        setup["options"]["install_requires"],
        *extras,
        (REPOSITORY / "examples" / "requirements.txt").read_text(),
        (REPOSITORY / "requirements" / "pins.txt").read_text(),
        (REPOSITORY / "requirements" / "build.in").read_text(),
        *build_requirements(),
    )


def build_requirements() -> list[str]:
    """What pip builds a wheel with."""
    listed = re.search(r"(?m)^requires = \[(.*)\]", (REPOSITORY / "pyproject.toml").read_text())
    assert listed is not None
    return re.findall(r'"([^"]+)"', listed[1])


def test_there_is_a_lock_for_each_python_that_setup_cfg_names() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert [f"python{version}.txt" for version in named] == [lock.name for lock in LOCKS]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_names_a_fitting_version_of_all_that_is_asked_for(lock: Path) -> None:
    versions = locked(lock)
    for requirement in asked():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock.name} lacks {requirement.name}: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} != {version}: `make lock`"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_kserves_package_has_a_lock_of_its_own(lock: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    (wanted,) = requirements(setup["options.extras_require"]["kserve"])
    assert wanted.specifier.contains(locked(lock.with_name(f"kserve-{lock.name}"))["kserve"])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_fits_any_build_of_torch(lock: Path) -> None:
    # The CPU build has none of the CUDA build's packages, and must not get gigabytes of them by the lock.
    assert not [name for name in locked(lock) if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_packages_that_are_installed_without_their_own_requirements_name_their_version() -> None:
    for requirement in requirements((REPOSITORY / "examples" / "requirements-no-deps.txt").read_text()):
        assert [pin.operator for pin in requirement.specifier] == ["=="]
