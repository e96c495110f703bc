"""Which plugins a configuration has: installed ones, those in folders, those that are named. Imports them to find out.

Runs in a process of its own (`probe`), so that whatever a plugin does while it is imported happens there first. Whoever
waits for that process is told of each step before it is taken.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wsgi_ts.plugins.api import ENDPOINT_TYPES, GROUPS, NAMED_ONLY, Mark, mark_of
from wsgi_ts.plugins.described import operations_of
from wsgi_ts.plugins.found import Found, PluginError, add_folders, bare, check_api, folders, import_object, said
from wsgi_ts.plugins.presence import PREFIX
from wsgi_ts.quick_dataclass import dataclass

if TYPE_CHECKING:
    from importlib import metadata

#: What an object that was not decorated is taken for: the group by the methods that no other has.
_TELLING = {"auth": ("authenticate",), "snapshot": ("save", "last"), "metrics": ("emit",), "fetch": ("open", "scheme")}
POLICY_METHODS = ("key", "cost", "admit", "wait")
_ENDPOINT_METHODS = ("do_get", "do_post", "do_put", "do_delete", "on_get", "on_post", "on_request")
#: What each group must have.
_WANTED = {**_TELLING, "auth": ("authenticate", "authorize"), "middleware": ("__call__",)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a configuration says of plugins; see the keys of the same names."""

    plugins_path: str = ""
    plugin: Sequence[str] = ()
    plugins: Sequence[str] = ()
    middleware: Sequence[str] = ()


#: Told of a module or object that is about to be imported; returns why it must not be, "" where it may.
Begin = Callable[[str], str]


def find_plugins(wanted: Wanted, begin: Begin) -> list[Found]:
    """All plugins that the configuration has, with what is wrong with them."""
    add_folders(wanted.plugins_path)
    found = [*_installed(wanted, begin), *_in_folders(wanted, begin)]
    found += [_named(target, "key plugin", "", begin) for target in wanted.plugin]
    found += [_named(target, "key middleware", "middleware", begin) for target in wanted.middleware]
    unique = {(each.group, each.target, each.path): each for each in found}
    return _without_doubles(list(unique.values()))


def jars(plugins_path: str) -> list[Path]:
    """The jars in the folders: plugins for a Java machine, which this server has not."""
    return [jar for folder in folders(plugins_path) for jar in sorted(folder.glob("*.jar"))]


def _distributions() -> Iterator[metadata.Distribution]:
    # Imported here, with the package for mails that it needs: all processes of a server import this module.
    from importlib import metadata

    yield from metadata.distributions()


def _entry_points(distributions: Iterable[metadata.Distribution]) -> Iterator[metadata.EntryPoint]:
    for distribution in distributions:
        for entry in distribution.entry_points:
            if entry.group.startswith(PREFIX):
                yield entry


def _installed(wanted: Wanted, begin: Begin) -> Iterator[Found]:
    """Plugins of installed distributions; what opens something to the network must be named."""
    for distribution in _distributions():
        in_folder = _is_in(distribution, folders(wanted.plugins_path))
        for entry in _entry_points([distribution]):
            group = entry.group.removeprefix(PREFIX)
            named = entry.name in wanted.plugins or (in_folder and not wanted.plugins)
            if named or (not wanted.plugins and group not in NAMED_ONLY):
                name, version = distribution.metadata["Name"], distribution.version
                row = Found(entry.name, group, entry.value.replace(" ", ""), f"{name} {version}", version)
                yield _examined(row, entry.name, begin)


def _is_in(distribution: metadata.Distribution, places: Sequence[Path]) -> bool:
    where = Path(str(distribution.locate_file("")))
    return any(where == place or place in where.parents for place in places)


def _in_folders(wanted: Wanted, begin: Begin) -> Iterator[Found]:
    """Decorated objects of the modules and packages that lie in the folders."""
    for folder in folders(wanted.plugins_path):
        if not folder.is_dir():
            yield Found(folder.name, "", "", "key plugins_path", error=f"plugins_path: no such folder: {folder}")
            continue
        for path in sorted(folder.iterdir()):
            is_module = path.suffix == ".py" and path.stem.isidentifier() and not path.name.startswith("test_")
            if not is_module and not (path / "__init__.py").is_file():
                continue
            for each in _in_module(path, begin):
                if not wanted.plugins or each.name in wanted.plugins:
                    yield each


def _in_module(path: Path, begin: Begin) -> Iterator[Found]:
    row = Found(path.stem, "", path.stem, str(path))
    if fault := begin(str(path)):
        yield replace(row, error=fault)
        return
    try:
        module = importlib.import_module(path.stem)
        _check_place(module, path)
        check_api(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        yield replace(row, error=said(error))
        return
    for attribute, value in sorted(vars(module).items()):
        mark = mark_of(value)
        # What a module has imported from another one is that one's.
        is_named = inspect.isclass(value) or inspect.isfunction(value)
        is_own = not is_named or value.__module__.partition(".")[0] == path.stem
        if mark is not None and is_own:
            row = Found(mark.name, mark.group, f"{path.stem}:{attribute}", str(path))
            yield _examined(row, mark.name, begin)


def _check_place(module: ModuleType, path: Path) -> None:
    """Something installed may have the name of a file in the folder, and is found first.

    Raises:
        PluginError: so it is.
    """
    file = Path(module.__file__ or "")
    if path not in (file, file.parent):
        raise PluginError(f"{path.name} has the name of the module in {file}; give it another name")


def _named(target: str, origin: str, group: str, begin: Begin) -> Found:
    name = target.rpartition(":")[2].rpartition(".")[2]
    return _examined(Found(name, group, target, origin), name, begin)


def _examined(row: Found, default_path: str, begin: Begin) -> Found:
    """The row, completed by what the object says of itself."""
    if fault := begin(row.target):
        return replace(row, error=fault)
    try:
        plugin = import_object(row.target)
        mark = mark_of(plugin)
        group = mark.group if mark is not None else row.group or _group_of(plugin)
        if row.group and group != row.group:
            raise PluginError(f"is named in the group {row.group} and says that it belongs to {group}")
        named = row if mark is None or row.version else replace(row, name=mark.name)
        return _with_details(replace(named, group=group), bare(plugin), mark, default_path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return replace(row, error=said(error))


def _with_details(row: Found, plugin: Any, mark: Mark | None, default_path: str) -> Found:
    """Checks that an object has what its group takes.

    Raises:
        PluginError: it has not.
    """
    if row.group == "endpoints":
        mark = mark or Mark("endpoints", row.name, default_path)
        if mark.type not in ENDPOINT_TYPES:
            raise PluginError(f"type {mark.type!r} is none of {', '.join(ENDPOINT_TYPES)}")
        if not callable(plugin) and not any(hasattr(plugin, each) for each in _ENDPOINT_METHODS):
            raise PluginError("is neither a function nor a class with do_get or on_get")
        operations = operations_of(plugin, mark.path)
        return replace(row, path=mark.path, type=mark.type, timeout_s=float(mark.timeout_s), operations=operations)
    missing = [name for name in _WANTED.get(row.group, ()) if not hasattr(plugin, name)]
    if missing:
        raise PluginError(f"a plugin of the group {row.group} needs {', '.join(missing)}")
    if row.group == "batching" and not any(hasattr(plugin, each) for each in POLICY_METHODS):
        raise PluginError(f"a plugin of the group batching needs one of {', '.join(POLICY_METHODS)}")
    return replace(row, scheme=str(plugin.scheme)) if row.group == "fetch" else row


def _group_of(plugin: Any) -> str:
    """The group of an object that no decorator and no entry point has spoken of.

    Raises:
        PluginError: it could be anything.
    """
    for group, names in _TELLING.items():
        if all(hasattr(plugin, name) for name in names):
            return group
    if any(hasattr(plugin, each) for each in _ENDPOINT_METHODS):
        return "endpoints"
    if any(hasattr(plugin, each) for each in POLICY_METHODS):
        return "batching"
    if inspect.isclass(plugin) and any(name in vars(plugin) for name in EVENTS):
        return "events"
    raise PluginError(f"does not say what it is: decorate it with @endpoint or @plugin (groups: {', '.join(GROUPS)})")


def _without_doubles(found: list[Found]) -> list[Found]:
    """Two endpoints cannot have one path, and of snapshots there is one store."""
    result: list[Found] = []
    taken: dict[tuple[str, str], Found] = {}
    for each in found:
        place = {"endpoints": f"{each.type}:{each.path}", "snapshot": "", "fetch": each.scheme}.get(each.group)
        if each.error or place is None:
            result.append(each)
            continue
        other = taken.setdefault((each.group, place), each)
        if other is not each:
            what = f'for endpoint "{each.path}"' if each.path else f"of the group {each.group}"
            result.append(replace(each, error=f"Multiple plugins found {what}: {other.target} and {each.target}"))
        else:
            result.append(each)
    return result


#: What a plugin of the group `events` is told.
EVENTS: Mapping[str, tuple[str, ...]] = {
    "server_started": ("addresses",),
    "server_stopping": (),
    "model_registering": ("name", "version", "url"),
    "model_registered": ("name", "version", "url"),
    "model_unregistered": ("name", "version"),
    "model_ready": ("name", "version"),
    "model_unready": ("name", "version"),
    "worker_started": ("name", "version", "worker_id", "pid"),
    "worker_died": ("name", "version", "worker_id", "reason", "last_lines"),
    "request_finished": ("records",),
}
