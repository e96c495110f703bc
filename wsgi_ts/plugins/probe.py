"""Finds a configuration's plugins before a server starts with them, in a process of its own.

`examine` starts that process and reads what it has found; `python -m wsgi_ts.plugins.probe` is the process. A plugin
that hangs, prints or ends its process while it is imported does so there, where somebody waits who can say so: the
process tells what it begins, and is started again without that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from wsgi_ts.logs.text import safe_text
from wsgi_ts.plugins.discovery import Wanted, find_plugins, jars
from wsgi_ts.plugins.found import Found, import_object, made, said
from wsgi_ts.plugins.presence import has_plugins
from wsgi_ts.process import python_command
from wsgi_ts.settings.config import Config, ConfigError

#: How long a plugin may take to be imported, and a store to give back the last snapshot, in seconds.
LIMIT_S = 60.0
SNAPSHOT_LIMIT_S = 10.0
#: What the owner of a jar is told.
JAR = (
    "{jar} is a plugin for Java, which this server does not have: write it in Python, in one file "
    "(`wsgi-ts plugin new endpoint NAME`, docs/plugins.md)"
)


def with_plugins(config: Config) -> Config:
    """The configuration with the plugins that were found, and what is wrong with them among its warnings.

    Raises:
        ConfigError: a plugin cannot be loaded without which the server must not start: one that says who may ask, two
            endpoints with one path, or any where `plugins_strict` is set.
    """
    if not has_plugins(config):
        return config
    found, snapshot = _ask(config)
    warnings = [JAR.format(jar=jar) for jar in jars(config.plugins_path)]
    for each in found:
        if each.error or each.problem:
            problem = f"plugin {each.name or each.target} ({each.origin}): {each.error or each.problem}"
            if config.plugins_strict or stops_the_start(each):
                raise ConfigError(problem)
            warnings.append(problem)
    missing = set(config.plugins) - {each.name for each in found}
    warnings += [f"plugins: there is no plugin {name}" for name in sorted(missing)]
    changes: dict[str, Any] = {} if snapshot is None else _restored(config, snapshot)
    return dataclasses.replace(
        config,
        found_plugins=tuple(each.row() for each in found),
        warnings=(*config.warnings, *map(safe_text, warnings)),
        **changes,
    )


def examine(config: Config) -> list[Found]:
    """The plugins of a configuration, with what is wrong with each.

    Raises:
        ConfigError: they could not be looked at.
    """
    return _ask(config)[0] if has_plugins(config) else []


def stops_the_start(found: Found) -> bool:
    """Whether a server must not start without a plugin that cannot be used."""
    return bool(found.error) and (found.group == "auth" or found.error.startswith("Multiple plugins"))


def _ask(config: Config) -> tuple[list[Found], Mapping[str, str] | None]:
    """The plugins, and what the store of one has of the last run."""
    wanted = Wanted(config.plugins_path, config.plugin, config.plugins, config.middleware)
    left_out: dict[str, str] = {}
    question = {
        "wanted": dataclasses.asdict(wanted),
        "snapshot": not config.no_config_snapshots and config.model_snapshot is None,
        "left_out": left_out,
    }
    while True:
        try:
            seen = _look(question)
        except (OSError, ValueError) as error:
            raise ConfigError(f"plugins: they cannot be looked at: {error}") from None
        if seen.answer is not None:
            return [Found(**row) for row in seen.answer["found"]], seen.answer["snapshot"]
        if not seen.step or seen.step in left_out:
            raise ConfigError(f"plugins: they cannot be looked at: {seen.fault}")
        left_out[seen.step] = seen.fault


class _Seen(NamedTuple):
    """How far a process has come: its answer, or the step that it has not ended ("": it had begun none), and why."""

    answer: dict[str, Any] | None
    step: str = ""
    fault: str = ""


def _look(question: Mapping[str, Any]) -> _Seen:
    with TemporaryFile() as asked, TemporaryFile() as errors:
        asked.write(json.dumps(question).encode())
        asked.seek(0)
        command = python_command("wsgi_ts.plugins.probe")
        with subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                seen = _followed(process.stdout)
            finally:
                process.kill()
        if seen.answer is None and not seen.fault:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            seen = seen._replace(fault=": ".join(["it ended the process that imported it", *lines[-1:]]))
        return seen


def _followed(stdout: IO[bytes]) -> _Seen:
    """Reads what the process says, until it answers, ends, or has been at one step for too long."""
    step, limit_s, begun = "", LIMIT_S, b""
    while select.select([stdout], [], [], limit_s)[0]:
        data = os.read(stdout.fileno(), 65536)
        if not data:
            return _Seen(None, step)
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "step" not in said:
                return _Seen(said)
            step = said["step"]
            limit_s = SNAPSHOT_LIMIT_S if said["is_snapshot"] else LIMIT_S
    return _Seen(None, step, f"no end within {limit_s:g} s")


def _restored(config: Config, snapshot: Mapping[str, str]) -> dict[str, Any]:
    """What of a store's snapshot counts: the models."""
    from wsgi_ts.settings.kinds import JSON_OBJECT

    text = snapshot.get("model_snapshot")
    if not text:
        return {}
    try:
        return {"model_snapshot": JSON_OBJECT.parse(text)}
    except ValueError as error:
        raise ConfigError(
            f"the snapshot store's model_snapshot: {error}; start with --ncs to begin without it"
        ) from None


def _main() -> None:
    # What plugins print while they are imported is not the answer.
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    left_out: dict[str, str] = question["left_out"]

    def tell(**what: Any) -> None:
        os.write(answer_fd, json.dumps(what).encode() + b"\n")

    def begin(step: str, *, is_snapshot: bool = False) -> str:
        if step not in left_out:
            tell(step=step, is_snapshot=is_snapshot)
        return left_out.get(step, "")

    found = find_plugins(Wanted(**question["wanted"]), begin)
    snapshot = None
    if question["snapshot"]:
        for number, store in enumerate(found):
            if store.group == "snapshot" and not store.error:
                fault = begin(f"last {store.target}", is_snapshot=True)
                if not fault:
                    snapshot, fault = _last(store)
                problem = f"the last snapshot cannot be read: {fault}" if fault else ""
                found[number] = dataclasses.replace(store, problem=problem)
    tell(found=[each.row() for each in found], snapshot=snapshot)
    # Threads that a plugin has started must not keep this process.
    sys.stderr.flush()
    os._exit(0)


def _last(store: Found) -> tuple[dict[str, Any] | None, str]:
    """The last snapshot of a store, or why there is none."""
    try:
        snapshot = made(import_object(store.target)).last()
        snapshot = None if snapshot is None else dict(snapshot)
        json.dumps(snapshot)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, said(error)
    return snapshot, ""


if __name__ == "__main__":
    _main()
