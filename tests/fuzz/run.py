"""Fuzzes the targets with atheris (libFuzzer), one process each: `make fuzz`, or `python -m fuzz.run --seconds 9 head`.

What libFuzzer finds on its way grows in `.fuzz/` (not kept). An input that breaks a promise is written into the corpus,
`tests/fuzz/corpus/TARGET/crash-…`, where every ordinary run of the tests replays it: mend the fault, give the file a
name that says what it is, and commit both.

`--minimise` takes out of the corpus what libFuzzer has named, if the rest reaches as much without it. What has a name
of its own was a fault once, and stays.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz import CORPUS, names

FOUND = Path(__file__).parents[2] / ".fuzz"
#: Inputs above this length find little more, and make a corpus large.
MAX_BYTES = 4096
#: An input that takes longer is a finding, too; instrumented code is some ten times slower.
SLOW_S = 10
#: Names that libFuzzer gives: the SHA-1 of what is in the file.
_LIBFUZZER_S = re.compile(r"[0-9a-f]{40}")


def main() -> int:
    """Runs each target for a while, or minimises its corpus; returns 1 if one of them has found something."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("targets", nargs="*", default=names(), metavar="target", help=", ".join(names()))
    arguments.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at the same time")
    arguments.add_argument("--minimise", action="store_true", help="look for nothing; make the kept corpus smaller")
    options = arguments.parse_args()
    unknown = set(options.targets) - set(names())
    if unknown:
        arguments.error(f"no such target: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(options.jobs) as pool:
        run = minimise if options.minimise else lambda name: fuzz(name, options.seconds)
        held = pool.map(run, options.targets)
        failed = [name for name, is_sound in zip(options.targets, held, strict=True) if not is_sound]
    if failed and not options.minimise:
        print(f"Findings: {', '.join(failed)}; see tests/fuzz/corpus/TARGET/crash-… and .fuzz/TARGET.log")
    return int(bool(failed))


def fuzz(name: str, seconds: int) -> bool:
    """Fuzzes one target; returns whether it held."""
    kept, found = CORPUS / name, FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-timeout={SLOW_S}", f"-artifact_prefix={kept}/"]
    code, last = _atheris(name, [*options, str(found), str(kept)])
    print(f"{name:<14} {'held' if code == 0 else f'BROKEN ({code})'}  {last}", flush=True)
    return code == 0


def minimise(name: str) -> bool:
    """Makes the kept corpus of a target smaller, where that reaches as much; returns whether it is sound."""
    kept = CORPUS / name
    FOUND.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wts-corpus-") as folder:
        smaller = Path(folder)
        for path in kept.iterdir():
            if _LIBFUZZER_S.fullmatch(path.name) is None:
                shutil.copy(path, smaller)
        code, _ = _atheris(name, ["-merge=1", f"-max_len={MAX_BYTES}", folder, str(kept)])
        reached, is_left = _reached(name, kept), {path.name for path in smaller.iterdir()}
        if code or not reached or _reached(name, smaller) != reached:
            print(f"{name:<14} left as it is ({code}): with less it reaches less, or it fails; see .fuzz/{name}.log")
            return False
    before = list(kept.iterdir())
    for path in before:
        if path.name not in is_left:
            path.unlink()
    print(f"{name:<14} {len(before)} inputs -> {len(is_left)}, which reach as much: {reached}", flush=True)
    return True


def _reached(name: str, corpus: Path) -> str:
    """What all inputs of a corpus reach, as libFuzzer counts branches and features; empty where one of them fails."""
    code, last = _atheris(name, ["-runs=0", str(corpus)], progress="\tDONE")
    found = re.search(r"cov: \d+ ft: \d+", last)
    return found[0] if found and not code else ""


def _atheris(name: str, arguments: list[str], progress: str = "") -> tuple[int, str]:
    """Runs libFuzzer on a target in a process of its own; returns its exit code and last line of progress.

    Args:
        name: the target.
        arguments: libFuzzer's.
        progress: what the line has in it; empty for any.
    """
    log = FOUND / f"{name}.log"
    program = FOUND / f"{name}.sh"  # to merge, libFuzzer starts its program again, by a name alone
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fuzz.child {shlex.quote(name)} "$@"\n')
    program.chmod(0o700)
    command = [str(program), *arguments]
    # In memory, as archives are unpacked some thousand times a second; libFuzzer ends without leaving time to clean up.
    with log.open("w") as output, tempfile.TemporaryDirectory(prefix="wts-fuzz-", dir="/dev/shm") as folder:
        # atheris counts branches of bytecode: compiled modules have none.
        environment = {**os.environ, "WSGI_TS_COMPILED": "0", "TMPDIR": folder, "FUZZ_PROGRAM": str(program)}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("#", "Done"))]
    return code, next((line for line in reversed(lines) if progress in line), "")


if __name__ == "__main__":
    sys.exit(main())
