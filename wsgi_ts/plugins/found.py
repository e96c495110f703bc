"""One plugin that was found: what the processes of an instance are told of it, and how it is imported."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wsgi_ts.plugins.api import API, API_NAME, ENDPOINT_TIMEOUT_S, Marked
from wsgi_ts.quick_dataclass import dataclass


class PluginError(Exception):
    """A plugin cannot be used; the message says why, and what to do, on one line."""


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin.

    Attributes:
        name: what it is called in logs, metrics and lists.
        group: one of `api.GROUPS`; empty where it could not be found out.
        target: `module:attribute`.
        origin: who names it: a distribution, a file, or a key.
        version: of its distribution; empty for none.
        path, type, timeout_s: of an endpoint, see `api.endpoint`.
        scheme: of a fetcher.
        operations: of an endpoint, what the API description says of each of its methods (`described`).
        error: why it cannot be used; empty where it can.
        problem: what has failed already of one that can be used all the same.
    """

    name: str
    group: str
    target: str
    origin: str
    version: str = ""
    path: str = ""
    type: str = ""
    timeout_s: float = ENDPOINT_TIMEOUT_S
    scheme: str = ""
    operations: Sequence[Mapping[str, str]] = ()
    error: str = ""
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """The plugin as JSON."""
        return dataclasses.asdict(self)


def found_in(rows: Iterable[Mapping[str, Any]], *groups: str) -> list[Found]:
    """The usable plugins of some groups, of `Config.found_plugins`."""
    found = [Found(**row) for row in rows]
    return [each for each in found if each.group in groups and not each.error]


def import_object(target: str) -> Any:
    """Imports `module:attribute`.

    Raises:
        PluginError: there is no such module or object, or it is written for another version of the API.
        Exception: what the module itself raises.
    """
    name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise PluginError(f"there is no module {error.name}; install it, or put it into plugins_path") from error
    check_api(module)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(f"module {name} has no {attribute}")
        found = getattr(found, part)
    return found


def check_api(module: Any) -> None:
    """Makes sure that a module is written for this version of the API.

    Raises:
        PluginError: it says that it is not.
    """
    wanted = getattr(module, API_NAME, API)
    if wanted != API:
        raise PluginError(f"{module.__name__} is written for plugin API {wanted!r}, this server has {API}")


def bare(plugin: Any) -> Any:
    """The object itself, where a decorator had to wrap it."""
    return plugin.plugin if isinstance(plugin, Marked) else plugin


def made(plugin: Any) -> Any:
    """An instance of a class; anything else as it is."""
    plugin = bare(plugin)
    return plugin() if isinstance(plugin, type) else plugin


def folders(plugins_path: str) -> list[Path]:
    """The folders of `plugins_path`; `folder/*`, as one writes it for jars, is `folder`."""
    return [Path(part.removesuffix("/*")).expanduser().absolute() for part in plugins_path.split(":") if part.strip()]


def add_folders(plugins_path: str) -> None:
    """Has modules be found in the folders and in the wheels there, after all that is installed."""
    for folder in folders(plugins_path):
        for place in (folder, *sorted(folder.glob("*.whl"))):
            if str(place) not in sys.path:
                sys.path.append(str(place))


def said(error: BaseException) -> str:
    """An exception on one line; of a plugin's own with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".removesuffix(": ")
