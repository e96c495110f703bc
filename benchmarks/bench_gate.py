"""`make bench-gate`: has this working tree become slower than another revision?

    python benchmarks/bench_gate.py                       against the last tag: about seven minutes
    python benchmarks/bench_gate.py --base 3015f8a        against that revision
    python benchmarks/bench_gate.py --interpreted         this tree as Python against this tree compiled
    python benchmarks/bench_gate.py --rounds 15           more rounds: a narrower spread

The other revision is checked out beside this one and run with this interpreter; nothing is installed. In each round
both servers are started anew and take turns with the same load. The exit status is 1 when a request costs more CPU time
than the limit allows, and 2 when nothing could be compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from archive_server import archive_models, our_server
from load import Load, check_wrk, failures, measure_load
from reports import markdown, say
from servers import PROJECT, WORK, BenchmarkError

LOADS = (
    *(Load(f"100 B, {count} connection{'s' * (count > 1)}", count) for count in (1, 16, 64)),
    *(Load(f"100 B, {count} connections, distinct heads", count, heads="distinct") for count in (16, 64)),
    Load("100 KB, 4 connections", 4, 100_000),
    Load("1 MB, 4 connections", 4, 1_000_000),
)
#: The figures that are compared: key of `run_load`, and heading.
COMPARED = (("cpu_us", "CPU µs/request"), ("per_second", "requests/s"))


@dataclass(frozen=True)
class Options:
    """What to compare, and how long.

    Attributes:
        base: the other revision; empty with `interpreted`.
        interpreted: the base is this working tree, run as Python.
        rounds: how often.
        seconds: length of each run.
        limit_percent: CPU time that may be added.
    """

    base: str
    interpreted: bool
    rounds: int
    seconds: float
    limit_percent: float


@dataclass(frozen=True)
class Pair:
    """The same figure of both revisions, measured one after the other."""

    base: float
    now: float

    @property
    def change_percent(self) -> float:
        """By how much it has grown."""
        return (self.now / self.base - 1) * 100


@dataclass(frozen=True)
class Tree:
    """A source tree, and how it is run.

    Attributes:
        path: where it is.
        environment: variables for its server.
    """

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def compiled(self) -> Tree:
        """Compiles its modules where it has some to compile, and they are not up to date."""
        if (self.path / "setup.py").exists():
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "."]
            subprocess.run(command, cwd=self.path, check=True)
        return self

    def describe(self) -> str:
        """Returns how its server runs.

        Raises:
            BenchmarkError: PYTHONPATH does not win over an installed package.
        """
        code = (
            "import wsgi_ts; print(wsgi_ts.__file__); "
            "print(wsgi_ts.compiled_modules.describe() if hasattr(wsgi_ts, 'compiled_modules') else 'interpreted')"
        )
        environment = {**os.environ, "PYTHONPATH": str(self.path), **self.environment}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=WORK, env=environment, capture_output=True, text=True, check=False
        )
        if not done.stdout.startswith(f"{self.path}{os.sep}"):
            raise BenchmarkError(f"wsgi_ts of {self.path} cannot be imported: {done.stdout}{done.stderr}")
        return done.stdout.splitlines()[1]


#: The pairs of each load's title and figure's key, round by round.
Pairs = dict[tuple[str, str], list[Pair]]


@contextmanager
def base_tree(options: Options) -> Iterator[Tree]:
    """What is compared with, for as long as it is open: another revision in a folder of its own, or this tree's Python.

    Raises:
        BenchmarkError: git does not know the revision.
    """
    if options.interpreted:
        yield Tree(PROJECT, {"WSGI_TS_COMPILED": "0"})
        return
    with revision(options.base) as tree:
        yield tree


@contextmanager
def revision(name: str) -> Iterator[Tree]:
    """Another revision of this repository in a folder of its own, compiled, for as long as it is open.

    Raises:
        BenchmarkError: git does not know the revision.
    """
    commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise BenchmarkError(f"git knows no revision {name!r}.")
    WORK.mkdir(exist_ok=True)
    folder = WORK / f"base-{commit[:12]}"
    git("worktree", "remove", "--force", str(folder))
    git("worktree", "prune")
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield Tree(folder).compiled()
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    """What a git command prints; empty where it fails."""
    done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def measure_round(number: int, trees: tuple[Tree, Tree], seconds: float, pairs: Pairs) -> None:
    """Starts both servers and adds a pair of each figure; who is first changes from load to load."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                our_server(source=tree.path, environment=tree.environment, models=("echo",), folder=folder)
            )
            for tree, folder in zip(trees, ("gate-base", "gate-now"), strict=True)
        ]
        for place, load in enumerate(LOADS):
            found: list[dict[str, float]] = [{}, {}]
            for index in (0, 1) if (number + place) % 2 == 0 else (1, 0):
                found[index] = measure_load(servers[index], load, seconds)
                if failures(found[index]):
                    raise BenchmarkError(f"{failures(found[index]):.0f} requests failed: {load.title}.")
            for key, _ in COMPARED:
                pairs.setdefault((load.title, key), []).append(Pair(found[0][key], found[1][key]))
            say(f"{load.title}: " + ", ".join(
                f"{heading} {found[0][key]:,.0f} -> {found[1][key]:,.0f}" for key, heading in COMPARED
            ))  # fmt: skip


def table(pairs: Pairs) -> str:
    """The medians of both revisions, and the median of the rounds' changes with their quartiles."""
    head = [""]
    for _, heading in COMPARED:
        head += [f"{heading}: base", "now", "change (quartiles)"]
    lines = []
    for load in LOADS:
        cells = [load.title]
        for key, _ in COMPARED:
            found = pairs[load.title, key]
            low, middle, high = quartiles([each.change_percent for each in found])
            cells += [f"{statistics.median(each.base for each in found):,.1f}"]
            cells += [f"{statistics.median(each.now for each in found):,.1f}"]
            cells += [f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"]
        lines.append(cells)
    return markdown(head, *lines)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def too_expensive(pairs: Pairs, limit_percent: float) -> list[str]:
    """The loads whose requests cost more CPU time than they may, each with its change."""
    changes = {
        load.title: quartiles([each.change_percent for each in pairs[load.title, "cpu_us"]])[1] for load in LOADS
    }
    return [f"{title}: {change:+.1f} %" for title, change in changes.items() if change > limit_percent]


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: there is no tag to compare with.
    """
    parser = argparse.ArgumentParser(description="Compares this working tree's speed with another revision's.")
    parser.add_argument("--base", default="", help="the other revision (default: the last tag)")
    parser.add_argument("--interpreted", action="store_true", help="compare with this tree, run as Python")
    parser.add_argument("--rounds", type=int, default=8, help="rounds, each with freshly started servers (default 8)")
    parser.add_argument("--seconds", type=float, default=3, help="length of each run (default 3)")
    parser.add_argument("--limit", type=float, default=3, help="per cent of CPU time that are allowed (default 3)")
    given = parser.parse_args()
    base = given.base or git("describe", "--tags", "--abbrev=0")
    if not base and not given.interpreted:
        raise BenchmarkError("there is no tag to compare with: give a revision (make bench-gate BASE=..., or --base).")
    return Options(base, given.interpreted, given.rounds, given.seconds, given.limit)


def main() -> None:
    """Compares, prints the table, and ends with status 1 when the working tree is too expensive."""
    try:
        options = parse_options()
        check_wrk()
        WORK.mkdir(exist_ok=True)
        archive_models(("echo",))
        pairs: Pairs = {}
        with base_tree(options) as base:
            now = Tree(PROJECT).compiled()
            print(f"==> base: {base.describe()}; working tree: {now.describe()}", flush=True)
            for number in range(options.rounds):
                print(f"==> round {number + 1} of {options.rounds}: base -> working tree", flush=True)
                measure_round(number, (base, now), options.seconds, pairs)
        print(f"\n{table(pairs)}\n")
        if found := too_expensive(pairs, options.limit_percent):
            sys.exit(f"bench-gate: above {options.limit_percent:+g} % CPU time per request: {'; '.join(found)}")
        print(f"no load takes more than {options.limit_percent:+g} % CPU time per request")
    except (BenchmarkError, subprocess.CalledProcessError) as error:
        print(f"bench-gate: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
