"""`make prove`: what it costs the clients when processes die, of wsgi-ts and of the servers that it is compared with.

    python -m reliability.prove                  everything: about three hours
    python -m reliability.prove --quick          a first impression: a few minutes for each server
    python -m reliability.prove --only mosec     only this server; may be repeated
    python -m reliability.prove --publish        also put the tables into docs/reliability.md
    python -m reliability.prove --resume FILE    only what a result file of an earlier run lacks

docs/reliability.md tells the method. A figure that falls short stays in the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import psutil
from reports import failures_told, report, say
from rivals import torchserve
from servers import BENCHMARKS, PROJECT, BenchmarkError

from reliability import measures, proof_tables
from reliability.subjects import RIVALS, Ours

PAGE = PROJECT / "docs" / "reliability.md"
BEGIN_MARK, END_MARK = "<!-- written by make prove -->", "<!-- end of what make prove writes -->"
#: A rival that is not whole again after so long, in seconds, is started by hand.
RIVAL_BACK_S = 30.0


@dataclass(frozen=True)
class Options:
    """How much to do.

    Attributes:
        names: the servers.
        kills: of ours; `rival_kills` of each of the others, which take longer to come back.
        soak_s: of ours; `rival_soak_s` of each of the others.
        registrations: models that come and go during a soak.
        overload_s: how long a server is asked for more than it can do, each half; and beside slow clients.
        faults: run the tests of all other faults, of ours.
        seed: of what is killed when.
        publish: write docs/reliability.md.
        resume: a result file, of which all that was measured is kept.
    """

    names: tuple[str, ...]
    kills: int
    rival_kills: int
    soak_s: float
    rival_soak_s: float
    registrations: int
    overload_s: float
    faults: bool
    seed: int
    publish: bool
    resume: Path | None


def prove(name: str, options: Options, known: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one server; what is `known` of it already is not measured again."""
    is_ours = name == Ours.name
    kills = options.kills if is_ours else options.rival_kills
    soak_s = options.soak_s if is_ours else options.rival_soak_s
    back_s = measures.BACK_S if is_ours else RIVAL_BACK_S
    steps: dict[str, Callable[[], Any]] = {
        "kills": lambda: measures.measure_kills(name, kills, options.seed, _every(kills), back_s),
        "ends": lambda: measures.measure_ends(name),
        "drain": lambda: measures.measure_drain(name),
        "overload": lambda: measures.measure_overload(name, options.overload_s),
        "slow": lambda: measures.measure_slow(name, options.overload_s),
        "soak": lambda: measures.measure_soak(name, soak_s, options.registrations, _every(int(soak_s))),
    }
    found: dict[str, Any] = {}
    for step, measure in steps.items():
        if known.get(step) is not None:
            found[step] = known[step]
            continue
        print(f"==> {name}: {step}", flush=True)
        began = time.monotonic()
        try:
            found[step] = measure()
        except (AssertionError, BenchmarkError, OSError, psutil.Error) as error:
            # The figures of the others are worth keeping; the table says what is missing.
            found[step] = None
            found.setdefault("troubles", []).append(f"{step}: {str(error)[:300]}")
            say(found["troubles"][-1])
            continue
        say(f"{proof_tables.brief(found[step])} ({time.monotonic() - began:.0f} s)")
    return found


def _every(total: int) -> Callable[[int], None]:
    """Says how far something has come, ten times."""
    said = [0]

    def progress(done: int) -> None:
        if done * 10 // max(1, total) > said[0]:
            said[0] = done * 10 // max(1, total)
            say(f"{done} of {total}")

    return progress


def read_result(path: Path) -> dict[str, Any]:
    """Reads the result file of an earlier run, with what was found of the servers as it was before it was written.

    Raises:
        BenchmarkError: the file is none, or not there.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["servers"] = {
            name: {step: kind(**rows[step]) for step, kind in proof_tables.STEPS.items() if rows.get(step)}
            for name, rows in result["servers"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"--resume {path}: this is no result file of make prove: {error}") from error
    return result


def run_fault_tests() -> dict[str, dict[str, list[str]]]:
    """Runs the tests of all other faults, those too long for CI as well.

    Returns:
        For each module, the tests that `passed`, `failed` and were `skipped`.
    """
    print("==> wsgi-ts: all other faults (pytest)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junit-xml={report}",
            str(PROJECT / "tests" / "reliability"),
        ]
        command += ["--deselect", "tests/reliability/test_kills.py"]  # the kills are measured
        environment = {**os.environ, "WSGI_TS_PROVE": "1", "PYTHONPATH": str(PROJECT)}
        subprocess.run(command, cwd=PROJECT, env=environment, check=False)
        found: dict[str, dict[str, list[str]]] = {}
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            module = case.attrib["classname"].rpartition(".")[2]
            tags = {child.tag for child in case}
            kind = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            reason = "".join(child.attrib.get("message", "") for child in case if child.tag == "skipped")
            rows = found.setdefault(module, {"passed": [], "failed": [], "skipped": []})
            rows[kind].append(case.attrib["name"] + (f": {reason}" if reason else ""))
        return found


def parse_options() -> Options:
    """The command line.

    Raises:
        BenchmarkError: part of the figures is to be published.
    """
    parser = argparse.ArgumentParser(description="Kills, fills and overloads wsgi-ts and other model servers.")
    names = (Ours.name, *RIVALS)
    parser.add_argument("--only", action="append", choices=names, help="only this server; may be repeated")
    parser.add_argument("--quick", action="store_true", help="as much as CI does: a first impression")
    parser.add_argument("--kills", type=int, help="processes of wsgi-ts to kill (default 1000)")
    parser.add_argument("--rival-kills", type=int, help="processes of each other server to kill (default 60)")
    parser.add_argument("--soak", type=float, help="minutes of the soak (default 30; a third of it for the others)")
    parser.add_argument("--registrations", type=int, help="models that come and go in a soak (default 1000)")
    parser.add_argument("--no-faults", action="store_true", help="leave out the tests of all other faults")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument("--publish", action="store_true", help="put the tables into docs/reliability.md")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="measure only what this result file lacks")
    given = parser.parse_args()
    if given.publish and (given.only or given.no_faults):
        raise BenchmarkError("--publish replaces all figures in docs/reliability.md: leave --only, --no-faults away")
    quick = given.quick
    soak_s = 60 * (given.soak or (0.5 if quick else 30))
    return Options(
        names=tuple(name for name in names if not given.only or name in given.only),
        kills=given.kills or (20 if quick else 1000),
        rival_kills=given.rival_kills or (6 if quick else 60),
        soak_s=soak_s,
        rival_soak_s=soak_s / 3,
        registrations=given.registrations or (10 if quick else 1000),
        overload_s=4 if quick else 15,
        faults=not given.no_faults,
        seed=given.seed,
        publish=given.publish,
        resume=given.resume,
    )


def main() -> None:
    """Runs all of it, prints the tables and writes the result file."""
    with failures_told("prove"):
        options = parse_options()
        if torchserve.NAME in options.names:
            torchserve.check_java()
        began = time.monotonic()
        earlier = read_result(options.resume) if options.resume is not None else {"servers": {}, "faults": {}}
        faults = earlier["faults"]
        if options.faults and Ours.name in options.names and not faults:
            faults = run_fault_tests()
        found = {name: prove(name, options, earlier["servers"].get(name, {})) for name in options.names}
        minutes = (time.monotonic() - began) / 60
        how = f"`{_command()}`, seed {options.seed}, {minutes:.0f} minutes"
        if options.resume is not None:
            how += f"; the rest as measured at {earlier['machine']['when']}, commit {earlier['machine']['commit']}"
        text = proof_tables.render(found, faults, how)
        servers = {name: {step: _plain(value) for step, value in rows.items()} for name, rows in found.items()}
        content = {
            "options": {**asdict(options), "resume": str(options.resume or "")},
            "faults": faults,
            "servers": servers,
        }
        versions = rival_versions([name for name in options.names if name != Ours.name])
        marks = (BEGIN_MARK, END_MARK) if options.publish else None
        report(text, content, "reliability-", marks, versions, PAGE)


def _command() -> str:
    return "make prove" + (f' PROVE_ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else "")


def _plain(value: Any) -> Any:
    """For a JSON file."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def rival_versions(names: Sequence[str]) -> dict[str, str]:
    """The version of each rival, from its requirements file."""
    found = {}
    for name in names:
        pinned = re.search(rf"^{name}==(\S+)$", (BENCHMARKS / "rivals" / f"{name}.txt").read_text(), re.MULTILINE)
        if pinned:
            found[name] = pinned[1]
    return found


if __name__ == "__main__":
    main()
