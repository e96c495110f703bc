"""Finds a configuration's plugins before a server starts with them, in a process of its own.

`examine` starts that process and reads what it has found; `python -m wsgi_ts.plugins.probe` is the process. A plugin
that hangs, prints or ends its process while it is imported does so there, where somebody waits who can say so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from wsgi_ts.logs.text import safe_text
from wsgi_ts.plugins.discovery import Wanted, find_plugins, jars
from wsgi_ts.plugins.found import Found, found_in, import_object, made, said
from wsgi_ts.plugins.presence import has_plugins
from wsgi_ts.process import python_command
from wsgi_ts.settings.config import Config, ConfigError

#: How long all plugins together may take to be imported, in seconds.
LIMIT_S = 60.0
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
    found, snapshot, problems = _ask(config)
    warnings = [JAR.format(jar=jar) for jar in jars(config.plugins_path)] + problems
    for each in found:
        if each.error:
            problem = f"plugin {each.name or each.target} ({each.origin}): {each.error}"
            if config.plugins_strict or stops_the_start(each):
                raise ConfigError(problem)
            warnings.append(problem)
    if config.plugins_strict and problems:
        raise ConfigError(problems[0])
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
    return found.group == "auth" or found.error.startswith("Multiple plugins")


def _ask(config: Config) -> tuple[list[Found], Mapping[str, str] | None, list[str]]:
    wanted = Wanted(config.plugins_path, config.plugin, config.plugins, config.middleware)
    question = {
        "wanted": dataclasses.asdict(wanted),
        "snapshot": not config.no_config_snapshots and config.model_snapshot is None,
    }
    try:
        asked = subprocess.run(
            python_command("wsgi_ts.plugins.probe"),
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        answer = json.loads(asked.stdout)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"plugins: they were not imported within {LIMIT_S:g} s; find out which one hangs") from None
    except (OSError, ValueError) as error:
        lines = asked.stderr.decode(errors="replace").strip().splitlines() if isinstance(error, ValueError) else []
        reason = lines[-1] if lines else str(error)
        raise ConfigError(f"plugins: they cannot be imported, the process that did ended: {reason}") from None
    return [Found(**row) for row in answer["found"]], answer["snapshot"], answer["problems"]


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
    found = find_plugins(Wanted(**question["wanted"]))
    rows = [each.row() for each in found]
    snapshot, problems = None, []
    if question["snapshot"]:
        for store in found_in(rows, "snapshot"):
            try:
                snapshot = made(import_object(store.target)).last()
                snapshot = None if snapshot is None else dict(snapshot)
            except Exception as error:
                problems.append(f"plugin {store.name}: the last snapshot cannot be read: {said(error)}")
    with open(answer_fd, "w", encoding="utf-8") as answer:
        json.dump({"found": rows, "snapshot": snapshot, "problems": problems}, answer)
    # Threads that a plugin has started must not keep this process.
    answer_fd = -1
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
