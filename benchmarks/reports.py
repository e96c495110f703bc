"""What every benchmark does with its figures: progress, Markdown, the result file, BENCHMARKS.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from servers import BENCHMARKS, PROJECT, BenchmarkError


def say(text: str) -> None:
    """Progress, as it comes."""
    print(f"  {text}", flush=True)


def markdown(*lines: Sequence[str]) -> str:
    """A Markdown table; the first of the lines is its head."""
    rule = "|---" * len(lines[0]) + "|"
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, rule, *rest])


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def describe_machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "gunicorn", "falcon", "httptools")},
    }


def write_results(content: dict[str, Any], machine: dict[str, Any], kind: str = "") -> None:
    """Writes the file of one run into benchmarks/results, named by its time.

    Args:
        content: everything that was measured.
        machine: what `describe_machine` says.
        kind: put before the time in the file's name.
    """
    results = BENCHMARKS / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{kind}{machine['when'].replace(':', '').replace('+0000', 'Z')}.json"
    path.write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n")
    print(f"written to {path.relative_to(PROJECT)}")


def publish(text: str, machine: dict[str, Any], begin_mark: str, end_mark: str) -> None:
    """Puts the figures between two marks of BENCHMARKS.md.

    Args:
        text: the figures.
        machine: what `describe_machine` says.
        begin_mark: the line above them.
        end_mark: the line below them.

    Raises:
        BenchmarkError: the marks are not there.
    """
    page = PROJECT / "BENCHMARKS.md"
    before, begin, rest = page.read_text().partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise BenchmarkError(f"{page.name} lacks the lines {begin_mark!r} and {end_mark!r}.")
    about = (
        f"{machine['when'][:10]}, commit {machine['commit'] or 'none'}: {machine['cores']} cores "
        f"({machine['cpu']}), Linux {machine['kernel']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    )
    page.write_text(f"{before}{begin}\n\n{about}.\n\n{text}\n\n{end}{after}")
