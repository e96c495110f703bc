"""`wsgi-ts doctor`: whether this machine can run a configuration, and what to do where it cannot.

Starts nothing and changes nothing. Each check yields lines OK, WARN (runs, but not as meant) or FAIL (it
will not start, or not serve). What the start checks is checked here by the start's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wsgi_ts.checks import machine
from wsgi_ts.checks.machine import Finding
from wsgi_ts.settings.config import ConfigError
from wsgi_ts.settings.sources import CommandLine, load_config


def run_doctor(command_line: CommandLine, environ: Mapping[str, str], *, in_pod: bool = False) -> int:
    """Prints all findings for the flags that `serve` would get; returns the exit status, 1 if something FAILs.

    `in_pod`: the server is to run in a pod of Kubernetes.
    """
    failed = False
    for finding in examine(command_line, environ, in_pod=in_pod):
        print(finding, flush=True)
        failed = failed or finding.level == "FAIL"
    return 1 if failed else 0


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
