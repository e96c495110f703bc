"""Fuzzes the targets with atheris (libFuzzer), one process each: `make fuzz`, or `python -m fuzz.run --seconds 9 head`.

What libFuzzer finds on its way grows in `.fuzz/` (not kept). An input that breaks a promise is written into the corpus,
`tests/fuzz/corpus/TARGET/crash-…`, where every ordinary run of the tests replays it: mend the fault, give the file a
name that says what it is, and commit both.
"""

from __future__ import annotations

import argparse
import os
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


def main() -> int:
    """Runs each target for a while; returns 1 if one of them has found something."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("targets", nargs="*", default=names(), metavar="target", help=", ".join(names()))
    arguments.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at the same time")
    options = arguments.parse_args()
    unknown = set(options.targets) - set(names())
    if unknown:
        arguments.error(f"no such target: {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(options.jobs) as pool:
        held = pool.map(lambda name: fuzz(name, options.seconds), options.targets)
        failed = [name for name, is_sound in zip(options.targets, held, strict=True) if not is_sound]
    if failed:
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


def _atheris(name: str, arguments: list[str]) -> tuple[int, str]:
    """Runs libFuzzer on a target in a process of its own; returns its exit code and last line of progress."""
    log = FOUND / f"{name}.log"
    command = [sys.executable, "-m", "fuzz.child", name, *arguments]
    # In memory, as archives are unpacked some thousand times a second; libFuzzer ends without leaving time to clean up.
    with log.open("w") as output, tempfile.TemporaryDirectory(prefix="wts-fuzz-", dir="/dev/shm") as folder:
        # atheris counts branches of bytecode: compiled modules have none.
        environment = {**os.environ, "WSGI_TS_COMPILED": "0", "TMPDIR": folder}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    progress = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("#", "Done"))]
    return code, progress[-1] if progress else ""


if __name__ == "__main__":
    sys.exit(main())
