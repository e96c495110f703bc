"""`wsgi-ts doctor --migrate`: what will be otherwise here with the files of a TorchServe. Runs none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from wsgi_ts.cgroup import memory_limit, usable_cores
from wsgi_ts.checks.difference import Difference
from wsgi_ts.checks.migrated_archive import check_archive
from wsgi_ts.checks.migrated_properties import check_log_config, check_metrics_config, check_properties, jar_difference
from wsgi_ts.settings.stores import ARCHIVE_SUFFIXES
from wsgi_ts.workflows.check import check_workflow
from wsgi_ts.workflows.source import SourceError, open_source

_LOOKED_AT_BYTES = 4096
_MANIFEST = Path("MAR-INF", "MANIFEST.json")
_MANIFEST_OF_WORKFLOW = Path("WAR-INF", "MANIFEST.json")


class NothingThere(Exception):
    """There is nothing of that path, or nothing that could be looked at."""


def check_migration(path: Path, environ: Mapping[str, str]) -> Iterator[Difference]:
    """All differences of a configuration file, an archive, or a folder with such; `environ` is for `$$NAME$$`.

    Raises:
        NothingThere: no such file, or one of no known kind.
    """
    if not path.exists():
        raise NothingThere(f"{path}: no such file or folder")
    check = _check_of(path)
    if check is not None:
        yield from _one(path, environ)
    elif path.is_dir():
        inside = [each for each in sorted(path.iterdir()) if not each.name.startswith(".") and _check_of(each)]
        if not inside:
            raise NothingThere(f"{path}: holds no archive and no configuration file")
        for each in inside:
            yield from _one(each, environ)
    elif _is_text(path):
        yield from check_properties(path, environ)
    else:
        raise NothingThere(
            f"{path}: is none of config.properties, .mar, .tar.gz, .war, log4j2.xml, metrics.yaml, a jar, a model store"
        )


def _is_text(path: Path) -> bool:
    """Whether it can be a configuration file: those may have any name."""
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(_LOOKED_AT_BYTES)
    except OSError:
        return True  # what cannot be read is told where it is read


def _check_of(path: Path) -> str | None:
    """What kind of file it is, by its name; None for a kind that is of no interest."""
    name = path.name.lower()
    if path.is_dir():
        kinds = {"archive": path / _MANIFEST, "workflow": path / _MANIFEST_OF_WORKFLOW}
        return next((kind for kind, file in kinds.items() if file.is_file()), None)
    if name.endswith((*ARCHIVE_SUFFIXES, ".tgz", ".zip")):
        return "archive"
    if name.endswith((".properties", ".cfg")):
        return "properties"
    if name.startswith("log4j2") and name.endswith(".xml"):
        return "logs"
    if name.startswith("metrics") and name.endswith((".yaml", ".yml")):
        return "metrics"
    return {".war": "workflow", ".jar": "jar"}.get(path.suffix.lower())


def _one(path: Path, environ: Mapping[str, str]) -> Iterator[Difference]:
    kind = _check_of(path)
    if kind == "archive":
        yield from check_archive(path)
    elif kind == "properties":
        yield from check_properties(path, environ)
    elif kind == "logs":
        yield from check_log_config(path, environ)
    elif kind == "metrics":
        yield from check_metrics_config(path)
    elif kind == "jar":
        yield jar_difference(path)
    else:
        yield from _check_workflow(path)


def _check_workflow(path: Path) -> Iterator[Difference]:
    try:
        with open_source(path) as source:
            for finding in check_workflow(source, path.parent):
                if finding.level != "OK":
                    yield Difference(finding.level, f"{path}!{finding.where}", finding.text, "")
    except SourceError as error:
        told = str(error).removeprefix(f"{path}: ")
        yield Difference("FAIL", str(path), f"is not accepted: {told}", "pack it again with torch-workflow-archiver")


def machine_notes() -> Iterator[Difference]:
    """What follows from this machine, or this container, for workers and threads."""
    cores, seen = usable_cores(), os.cpu_count() or 1
    limit = memory_limit()
    limits = f"{cores} of {seen} cores" + ("" if limit is None else f" and {limit / 2**30:.1f} GiB of memory")
    told = (
        f"{limits} may be used: a model of the start that says nothing gets {cores} workers, one per core or GPU, of "
        "one CPU thread each; TorchServe counts the cores that Java sees"
    )
    advice = "minWorkers and maxWorkers in model-config.yaml, or default_workers_per_model, say otherwise"
    yield Difference("NOTE", "this machine", told, advice)
