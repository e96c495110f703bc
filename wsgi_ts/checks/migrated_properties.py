"""A config.properties of TorchServe, key by key: what it will mean here. All of it is read, whatever is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsgi_ts.checks.difference import Difference, Level
from wsgi_ts.metrics.specification import MetricsConfigError, load_specification
from wsgi_ts.models.recorded import parse_models
from wsgi_ts.plugins.discovery import jars
from wsgi_ts.settings.address import Address
from wsgi_ts.settings.config import property_settings
from wsgi_ts.settings.kinds import BOOLEAN, OIP, UnclearValue
from wsgi_ts.settings.model_entries import ENTRY_KEYS, unknown_settings
from wsgi_ts.settings.properties import PropertiesError, parse_properties, substitute_variables
from wsgi_ts.settings.sources import SNAPSHOT_NOTES, nearest

#: Keys that files can hold, that are looked for there.
_FILES = ("private_key_file", "certificate_file", "keystore", "metrics_config", "cpp_log_config")
#: What a key store of that kind begins with, whatever its name.
_JKS_BEGIN = b"\xfe\xed\xfe\xed"
_REMOVE = "remove the line"
#: Keys that mean something else here, or that want something.
_OTHERWISE: Mapping[str, tuple[Level, str, str]] = {
    "number_of_netty_threads": (
        "NOTE",
        "is the number of web workers here, at most two per core",
        "web_workers says it directly",
    ),
    "debug": (
        "WARN",
        "one worker per startup model and no time-outs, in place of a worker that is started by hand",
        "",
    ),
    "install_py_dep_per_model": (
        "NOTE",
        "installs into a virtual environment for each distinct requirements file, which is used again",
        "",
    ),
    "cpu_launcher_enable": (
        "WARN",
        "has no effect: workers are forks of a warm process, with cores / workers threads each",
        "pin cores with taskset or CPUAffinity; threadsPerWorker in model-config.yaml sets the threads",
    ),
    "default_response_timeout": ("NOTE", "a model-config.yaml without responseTimeout says 120 s before it", ""),
}
_ON = frozenset(("debug", "install_py_dep_per_model", "cpu_launcher_enable"))


@dataclass(frozen=True)
class Entry:
    """One line of the file that counts: its text with variables put in, the value if it has one, and its place."""

    text: str
    value: Any
    where: str


def read_properties(path: Path, environ: Mapping[str, str]) -> tuple[dict[str, Entry], list[Difference]]:
    """The keys that are known, and everything about the file that differs; `environ` is for its `$$NAME$$`."""
    try:
        rows = parse_properties(path.read_bytes())
    except OSError as error:
        return {}, [Difference("FAIL", str(path), f"cannot be read: {error.strerror}", "check its permissions")]
    except PropertiesError as error:
        return {}, [Difference("FAIL", f"{path}:{error.line}", str(error), "the server does not start: correct it")]
    known = property_settings()
    entries: dict[str, Entry] = {}
    found: list[Difference] = []
    for row in rows:
        where = f"{path}:{row.line}: {row.key}"
        if row.key not in known:
            if row.key not in SNAPSHOT_NOTES:
                told = f"is unknown and ignored{nearest(row.key, known)}"
                found.append(Difference("WARN", where, told, "correct it, or remove the line"))
            continue
        if row.key in entries:
            told = f"is given again; {entries[row.key].where.rsplit(': ', 1)[0]} does not count"
            found.append(Difference("WARN", where, told, "remove one of the lines"))
        try:
            text = substitute_variables(row.value, environ)
        except ValueError as error:
            told = "set the variable before the start, and for this check"
            found.append(Difference("FAIL", where, str(error), told))
            continue
        value, faults = _parsed(row.key, text, where)
        found += faults
        entries[row.key] = Entry(text, value, where)
    return entries, found


def _parsed(key: str, text: str, where: str) -> tuple[Any, list[Difference]]:
    row = property_settings()[key]
    is_boolean = row.kind in (BOOLEAN, OIP)
    stripped = text if is_boolean else text.strip()
    if not stripped and row.kind.empty != "value":
        if row.kind.empty == "warned":
            return None, [Difference("WARN", where, "is empty and taken as not given", "remove the line")]
        return None, []
    try:
        return row.kind.parse(stripped), []
    except UnclearValue as error:
        counts = row.default if error.instead is None else error.instead
        told = f"{error}; taken for {str(counts).lower()}"
        return error.instead, [Difference("WARN", where, told, "write what is meant")]
    except ValueError as error:
        return None, [Difference("FAIL", where, str(error), "the server does not start with it: correct the value")]


def check_properties(path: Path, environ: Mapping[str, str]) -> list[Difference]:
    """All that will differ with a config.properties, or a snapshot of TorchServe's, by line."""
    entries, found = read_properties(path, environ)

    def line(difference: Difference) -> int:
        number = difference.where.removeprefix(f"{path}:").partition(":")[0]
        return int(number) if number.isdigit() else 1 << 30

    return sorted([*found, *_check_entries(path, entries, environ)], key=line)


def _check_entries(path: Path, entries: Mapping[str, Entry], environ: Mapping[str, str]) -> Iterator[Difference]:
    known = property_settings()
    for key, entry in entries.items():
        if key in _OTHERWISE and (key not in _ON or entry.value):
            level, text, advice = _OTHERWISE[key]
            yield Difference(level, entry.where, text, advice)
        elif not known[key].has_effect and key != "vmargs":
            yield Difference("WARN", entry.where, f"has no effect here ({known[key].help})", _REMOVE)
        if key in _FILES and entry.text.strip() and not os.path.isfile(os.path.expanduser(entry.text.strip())):
            told = f"no file {entry.text.strip()} here, seen from {Path.cwd()}"
            yield Difference("WARN", entry.where, told, "check where the server will be started, or correct the path")
    yield from _check_vmargs(entries, environ)
    yield from _check_access(entries, path)
    yield from _check_tls(entries)
    yield from _check_models(entries)
    yield from _check_plugins(entries)
    yield from _check_metrics(entries)


def _check_vmargs(entries: Mapping[str, Entry], environ: Mapping[str, str]) -> Iterator[Difference]:
    from wsgi_ts.logs.user_config import log4j_file

    entry = entries.get("vmargs")
    if entry is None:
        return
    path = log4j_file(entry.text)
    if path is None:
        yield Difference("WARN", entry.where, "there is no Java machine: it has no effect", _REMOVE)
        return
    yield Difference("NOTE", entry.where, f"of it only the log configuration counts: {path}", "--log-config names it")
    if path.is_file():
        yield from check_log_config(path, environ)
    else:
        yield Difference("FAIL", entry.where, f"{path} is not there", "the server does not start: correct the path")


def check_log_config(path: Path, environ: Mapping[str, str]) -> Iterator[Difference]:
    """What of a log4j2.xml or log4j2.properties has no counterpart."""
    from wsgi_ts.logs.notation import LogConfigError
    from wsgi_ts.logs.user_config import log4j_rows

    try:
        _, notes = log4j_rows(path, path.read_text(encoding="utf-8", errors="replace"), environ)
    except LogConfigError as error:
        place = re.match(rf"({re.escape(str(path))}(?::[0-9]+)?): (.*)", str(error), re.DOTALL)
        where, text = place.groups() if place else (str(path), str(error))
        yield Difference("FAIL", where, text, "the server does not start with it: correct it, or start without it")
        return
    for note in notes:
        # "what (line 7)"
        what, _, line = note.removesuffix(")").rpartition(" (line ")
        where, text = (f"{path}:{line}", what) if line.isdigit() else (str(path), note)
        told = f"{text} has no counterpart here, and is left out"
        yield Difference("WARN", where, told, "docs/logging.md says what there is instead")


def _check_access(entries: Mapping[str, Entry], path: Path) -> Iterator[Difference]:
    tokens = entries.get("disable_token_authorization")
    for key in ("inference_address", "management_address"):
        entry = entries.get(key)
        if entry is None or not isinstance(entry.value, Address) or entry.value.is_local or tokens is not None:
            continue
        told = "others can reach it, so that requests need a token, as in TorchServe since 0.11.1"
        advice = "take the key from key_file.json, or set disable_token_authorization=true"
        yield Difference("WARN", entry.where, told, advice)
    if "enable_model_api" not in entries:
        told = "enable_model_api is not set: models cannot be registered over the API, as in TorchServe since 0.11.1"
        yield Difference("NOTE", str(path), told, "set enable_model_api=true where they are")


def _check_tls(entries: Mapping[str, Entry]) -> Iterator[Difference]:
    addresses = [entry.value for entry in entries.values() if isinstance(entry.value, Address)]
    grpc = entries.get("enable_grpc_ssl")
    if not any(address.is_tls for address in addresses) and (grpc is None or grpc.value is not True):
        return
    kind, store = entries.get("keystore_type"), entries.get("keystore")
    if store is not None and ((kind is not None and kind.text.strip().upper() == "JKS") or _is_jks(store.value)):
        told = "is a key store of the kind JKS, which cannot be read"
        advice = "keytool -importkeystore -srckeystore OLD -destkeystore NEW -deststoretype PKCS12 converts it"
        yield Difference("FAIL", store.where, told, advice)
    for one, other in (("certificate_file", "private_key_file"), ("private_key_file", "certificate_file")):
        if one in entries and other not in entries and store is None:
            told = f"is given without {other}: the server does not start, where TorchServe makes a certificate itself"
            yield Difference("FAIL", entries[one].where, told, f"add {other}, or remove this line")


def _is_jks(path: Any) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_JKS_BEGIN)) == _JKS_BEGIN
    except (OSError, TypeError):
        return False


def _check_models(entries: Mapping[str, Entry]) -> Iterator[Difference]:
    entry = entries.get("models")
    if entry is not None and isinstance(entry.value, dict):
        for name, version, key in unknown_settings(entry.value):
            told = f"model {name!r}, version {version!r}: setting {key!r} is ignored{nearest(key, ENTRY_KEYS)}"
            yield Difference("WARN", entry.where, told, "correct it, or remove it")
        waits = [
            f"{name} {version}"
            for name, versions in entry.value.items()
            for version, fields in versions.items()
            if fields.get("batchSize", 1) > 1 and fields.get("maxBatchDelay", 0) > 0
        ]
        if waits:
            told = f"maxBatchDelay is a limit here and no wait ({', '.join(waits)})"
            yield Difference("NOTE", entry.where, told, "batch_policy=fixed waits as before")
    snapshot = entries.get("model_snapshot")
    if snapshot is not None and isinstance(snapshot.value, dict):
        try:
            parse_models(snapshot.value)
        except ValueError as error:
            told = f"the models in it cannot be restored: {error}"
            yield Difference("FAIL", snapshot.where, told, "remove the file, or start with --ncs")


def _check_plugins(entries: Mapping[str, Entry]) -> Iterator[Difference]:
    entry = entries.get("plugins_path")
    if entry is None:
        return
    for jar in jars(entry.text):
        yield jar_difference(jar, entry.where)


def jar_difference(jar: Path, where: str = "") -> Difference:
    """A plugin for Java."""
    told = "is a plugin for a Java machine, which this server does not have"
    advice = "write it in Python, in a dozen lines (docs/plugins.md); those for SageMaker and DynamoDB are there"
    return Difference("WARN", f"{where}: {jar}" if where else str(jar), told, advice)


def _check_metrics(entries: Mapping[str, Entry]) -> Iterator[Difference]:
    entry = entries.get("metrics_config")
    if entry is not None and entry.value is not None and os.path.isfile(entry.value):
        yield from check_metrics_config(entry.value)
    mode = entries.get("metrics_mode")
    if mode is not None and mode.value == "legacy":
        told = "the mode is deprecated in TorchServe; it works here"
        yield Difference("NOTE", mode.where, told, "metrics_mode=prometheus has all metrics on one page")


def check_metrics_config(path: Path) -> Iterator[Difference]:
    """Whether metrics of one's own can be recorded."""
    try:
        load_specification(path)
    except MetricsConfigError as error:
        yield Difference("FAIL", str(path), f"no metrics are recorded with it: {error}", "correct it")
