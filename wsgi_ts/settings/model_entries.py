"""The entries that TorchServe keeps for each version of a model: in the key `models`, and in its snapshots.

Both are JSON, model → version → settings. Numbers are converted where that loses nothing; a setting of another type is
an error that names model, version and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wsgi_ts.settings.conversion import to_boolean, to_text, to_whole_number
from wsgi_ts.settings.lenient_json import parse_lenient

#: The runtimes a manifest or a register call may name.
RUNTIMES = ("python", "python3", "LSP")
#: Numbers of a version, by their names here, in the key `models` and in snapshots; delays in ms, time-outs in s.
ENTRY_NUMBERS = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout")
#: What TorchServe knows of a version, and what each is.
ENTRY_KEYS: dict[str, Callable[[Any], Any]] = {
    "defaultVersion": to_boolean,
    "marName": to_text,
    **dict.fromkeys(ENTRY_NUMBERS, to_whole_number),
    "parallelLevel": to_whole_number,
    "runtimeType": to_text,
}


def known_runtime(runtime: Any) -> Any:
    """The runtime as it is spelt here, where it is one in any case; else what was given."""
    spelt = {each.lower(): each for each in RUNTIMES}
    return spelt.get(runtime.lower(), runtime) if isinstance(runtime, str) else runtime


def parse_object(text: str) -> dict[str, Any]:
    """Reads a JSON object, in the dialect that TorchServe accepts; raises ValueError with half a sentence."""
    try:
        value = parse_lenient(text, unique_keys=True)
    except ValueError as error:
        lines = "; if it goes on in the next line, this one needs a backslash at its end"
        hint = lines if str(error).endswith("at the end") else ""
        raise ValueError(f"not valid JSON: {error}{hint}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object ({...})")
    return value


def parse_models(text: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Reads the key `models`; settings that are null are left out, unknown ones stay as they are.

    Raises:
        ValueError: it is no such JSON, or a setting has a value of another type.
    """
    return {
        name: {version: convert_entry(name, version, entry) for version, entry in versions.items()}
        for name, versions in _objects(parse_object(text))
    }


def convert_entry(name: str, version: str, entry: Any) -> dict[str, Any]:
    """The settings of one version, each in its type.

    Raises:
        ValueError: one cannot be converted; the message names model, version and key.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"model {name!r}, version {version!r}: not an object of settings")
    converted = {}
    for key, value in entry.items():
        if value is None:
            continue
        try:
            converted[key] = ENTRY_KEYS[key](value) if key in ENTRY_KEYS else value
        except ValueError as error:
            raise ValueError(f"model {name!r}, version {version!r}: {key}: {error}") from None
    return converted


def unknown_settings(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str, str]]:
    """Model, version and key of every setting in `models` that nobody reads."""
    for name, versions in models.items():
        for version, entry in versions.items():
            yield from ((name, version, key) for key in entry if key not in ENTRY_KEYS)


def _objects(outer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, inner in outer.items():
        if not isinstance(inner, dict):
            raise ValueError(f"model {name!r}: not an object of versions")
        yield name, inner
