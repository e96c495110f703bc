"""`wsgi-ts doctor`: whether this machine can run a configuration, and what to do where it cannot.

Starts nothing and changes nothing. Each check yields lines OK, WARN (runs, but not as meant) or FAIL (it
will not start, or not serve). What the start checks is checked here by the start's own functions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from wsgi_ts.checks import machine
from wsgi_ts.checks.difference import Difference
from wsgi_ts.checks.machine import Finding
from wsgi_ts.settings.config import ConfigError
from wsgi_ts.settings.sources import CommandLine, load_config

#: Exit status where there is nothing to look at, as wrong flags have it.
EXIT_USAGE = 2


def run_doctor(
    command_line: CommandLine,
    environ: Mapping[str, str],
    *,
    in_pod: bool = False,
    as_json: bool = False,
    strict: bool = False,
) -> int:
    """Prints all findings for the flags that `serve` would get; returns the exit status, 1 if something FAILs.

    Args:
        command_line: the flags.
        environ: the environment of the server.
        in_pod: the server is to run in a pod of Kubernetes.
        as_json: one JSON list, for programs.
        strict: WARN counts as FAIL.
    """
    rows = []
    for finding in examine(command_line, environ, in_pod=in_pod):
        rows.append(asdict(finding))
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps(rows, indent=1))
    return _status((row["level"] for row in rows), strict=strict)


def run_migration(paths: Sequence[str], environ: Mapping[str, str], *, as_json: bool, strict: bool) -> int:
    """Prints what will be otherwise here with configuration files, archives and model stores of a TorchServe.

    `environ` is for variables in configuration files; the flags are as for `run_doctor`.

    Returns:
        The exit status: 0; 1 where something FAILs; 2 where a path names nothing that can be looked at.
    """
    from wsgi_ts.checks.migration import NothingThere, check_migration, machine_notes

    found: list[Difference] = []
    try:
        for path in paths:
            for difference in check_migration(Path(path), environ):
                found.append(difference)
                if not as_json:
                    print(difference, flush=True)
    except NothingThere as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    notes = list(machine_notes())
    if as_json:
        print(json.dumps([each.to_json() for each in [*found, *notes]], indent=1))
    else:
        print("\n".join(map(str, notes)))
        counts = {level: sum(each.level == level for each in found) for level in ("FAIL", "WARN", "NOTE")}
        print(", ".join(f"{level} {count}" for level, count in counts.items()))
    return _status((each.level for each in found), strict=strict)


def _status(levels: Iterable[str], *, strict: bool) -> int:
    bad = ("FAIL", "WARN") if strict else ("FAIL",)
    return 1 if any(level in bad for level in levels) else 0


def examine(command_line: CommandLine, environ: Mapping[str, str], *, in_pod: bool = False) -> Iterator[Finding]:
    """All findings; without a usable configuration only those that do not depend on it."""
    yield from machine.check_machine()
    found = list(machine.check_python())
    yield from found
    yield from machine.check_compiled()
    yield from machine.check_clock()
    try:
        config = load_config(command_line, environ)
    except ConfigError as error:
        yield Finding("FAIL", "configuration", str(error))
        yield from machine.check_gpus(environ)
        return
    source = f"read from {config.config_file}" if config.config_file else "no file, defaults"
    yield Finding("OK", "configuration", source)
    for warning in config.warnings:
        yield Finding("WARN", "configuration", warning)
    yield from machine.check_open_files(config)
    yield from machine.check_cores(config)
    if all(finding.level != "FAIL" or finding.subject == "torch" for finding in found):
        # Not before: the start's functions need the packages that were just looked for, but for torch.
        from wsgi_ts.checks.configuration import CHECKS

        for check in CHECKS:
            yield from check(config)
        if in_pod:
            from wsgi_ts.checks.kubernetes import check_kubernetes

            yield from check_kubernetes(config)
    yield from machine.check_gpus(environ)
