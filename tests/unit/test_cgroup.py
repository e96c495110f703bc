"""Limits of control groups, as the kernel shows them in version 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wsgi_ts.cgroup import is_killed_as_one, memory_limit, usable_cores

CORES = len(os.sched_getaffinity(0))


def groups(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Makes the files; returns what the functions take."""
    root, own = folder / "cgroup", folder / "own"
    own.write_text(lines)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root, own


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/pod/main\n", {"pod/main/cpu.max": "max 100000\n", "pod/cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": f"{CORES * 100 - 10}000 100000"}, CORES),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "1"}, CORES),
        ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("no such line\n", {}, CORES),
    ],
)
def test_cores(tmp_path: Path, lines: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(*groups(tmp_path, lines, files)) == cores


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "67108864\n"}, 64 << 20),
        ("0::/a/b\n", {"a/memory.max": "1000", "a/b/memory.max": "2000"}, 1000),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": "5000\n"}, 5000),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_memory(tmp_path: Path, lines: str, files: dict[str, str], limit: int | None) -> None:
    assert memory_limit(*groups(tmp_path, lines, files)) == limit


@pytest.mark.parametrize(("text", "expected"), [("1\n", True), ("0\n", False)])
def test_whether_all_end_together(tmp_path: Path, text: str, expected: bool) -> None:
    assert is_killed_as_one(*groups(tmp_path, "0::/\n", {"memory.oom.group": text})) is expected


def test_what_the_kernel_shows_of_this_process_can_be_read() -> None:
    assert 1 <= usable_cores() <= CORES
    limit = memory_limit()
    assert limit is None or limit > 0
    assert is_killed_as_one() in (True, False)
