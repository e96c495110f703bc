"""What every benchmark does with its figures: progress, Markdown, the result file, BENCHMARKS.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def failures_told(name: str) -> Iterator[None]:
    """Ends the process with one line, and status 1, where a benchmark fails inside."""
    try:
        yield
    except (BenchmarkError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")


def report(
    text: str,
    content: dict[str, Any],
    kind: str = "",
    marks: tuple[str, str] | None = None,
    packages: Mapping[str, str] | None = None,
    page: Path = PROJECT / "BENCHMARKS.md",
) -> None:
    """What every benchmark ends with: prints its tables, and writes the file of the run into benchmarks/results.

    Args:
        text: the tables.
        content: everything that was measured.
        kind: put before the time in the file's name.
        marks: the lines of the page that the tables are to stand between; None: they are not published.
        packages: further packages that the figures depend on, with their versions.
        page: where they are published.

    Raises:
        BenchmarkError: the page lacks these lines.
    """
    machine = describe_machine()
    machine["packages"].update(packages or {})
    print(f"\n{text}\n")
    results = BENCHMARKS / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{kind}{machine['when'].replace(':', '').replace('+0000', 'Z')}.json"
    # Command lines have the place of this checkout, which is nobody else's business.
    path.write_text(json.dumps({"machine": machine, **content}, indent=2).replace(f"{PROJECT}/", "") + "\n")
    print(f"written to {path.relative_to(PROJECT)}")
    if marks is not None:
        _publish(text, machine, *marks, page)


def _publish(text: str, machine: dict[str, Any], begin_mark: str, end_mark: str, page: Path) -> None:
    """Puts the figures between two lines of a page."""
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
