"""MAR-INF/MANIFEST.json and model-config.yaml of a model directory, read with limits and checked.

What they name has to lie inside the model directory.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import yaml

from wsgi_ts.archive.entries import DEFAULT_LIMITS, ArchiveLimits, escape_name
from wsgi_ts.errors import BadRequest, InvalidModel, ServerError
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.conversion import to_text
from wsgi_ts.settings.lenient_json import parse_lenient
from wsgi_ts.settings.model_entries import RUNTIMES, known_runtime

log = logging.getLogger(__name__)

#: Where an archive has its manifest.
MANIFEST_PATH = PurePosixPath("MAR-INF", "MANIFEST.json")

#: The version where a manifest names none, or there is no manifest.
DEFAULT_VERSION = "1.0"
_MAX_JSON_DEPTH = 32
_MAX_YAML_NODES = 100_000
_MAX_YAML_DEPTH = 100
_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f/\\]")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive says of its model.

    Attributes:
        model_name: the name that the register call asked for, where it did.
        handler: the handler's file or name; None where it names none.
        runtime: one of RUNTIMES.
        serialized_file: the weights; this and the other files are relative to the model directory.
        model_file: the file of the model's architecture.
        config_file: its model-config.yaml.
        requirements_file: the packages that it needs.
        raw: MANIFEST.json as it stands in the archive, empty where there is none.
    """

    model_name: str
    model_version: str = DEFAULT_VERSION
    handler: str | None = None
    runtime: str = RUNTIMES[0]
    serialized_file: str | None = None
    model_file: str | None = None
    config_file: str | None = None
    requirements_file: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)


#: The entries of a manifest that name files, and the fields of Manifest that hold them.
_FILES = {
    "serializedFile": "serialized_file",
    "modelFile": "model_file",
    "configFile": "config_file",
    "requirementsFile": "requirements_file",
}


@contextmanager
def parsed_as(kind: type[ServerError], file: PurePosixPath) -> Iterator[None]:
    """Makes of the ValueErrors of a manifest what TorchServe says of one that cannot be parsed; the log has the reason.

    Args:
        kind: that error.
        file: the manifest, for the log.
    """
    try:
        yield
    except ValueError as error:
        log.warning("%s cannot be used: %s", file, error)
        raise kind("Failed to parse signature.json.") from error


@parsed_as(InvalidModel, MANIFEST_PATH)
def parse_manifest(
    source: Path | dict[str, Any], *, model_name: str | None = None, max_bytes: int = DEFAULT_LIMITS.max_manifest_bytes
) -> Manifest:
    """Checks a MANIFEST.json, the file (unread if larger than `max_bytes`) or its parsed content.

    `model_name` replaces its own name.

    Raises:
        InvalidModel: with TorchServe's text for what is missing or wrong.
    """
    raw = source if isinstance(source, dict) else read_json_object(source, max_bytes)
    model = raw.get("model", {})
    if model is None:
        raise InvalidModel("Missing Model entry in manifest file.")
    if not isinstance(model, dict):
        raise ValueError("model is not an object")
    name = model_name or text_of(model, "modelName")
    version = text_of(model, "modelVersion") or DEFAULT_VERSION
    runtime = known_runtime(raw.get("runtime", RUNTIMES[0]))
    if not name:
        raise InvalidModel("Model name is not defined.")
    if runtime not in RUNTIMES:
        raise InvalidModel("Runtime is not defined or invalid.")
    try:
        check_name("Model name", name)
        check_name("Model version", version)
    except BadRequest as error:
        raise InvalidModel(error.message) from error
    return Manifest(
        model_name=name,
        model_version=version,
        handler=text_of(model, "handler"),
        runtime=runtime,
        raw=raw,
        **{name: text_of(model, key) for key, name in _FILES.items()},
    )


def check_name(what: str, name: str) -> None:
    """Refuses a model name or version that could not be one part of a path: `what` names it in the error.

    Raises:
        BadRequest: it has a slash, backslash or control character, is "." or "..", or has over 255 bytes.
    """
    too_long = len(name.encode("utf-8", "surrogatepass")) > 255
    if _UNSAFE_NAME.search(name) or name in ("", ".", "..") or too_long:
        raise BadRequest(
            f"{what} is not allowed: {escape_name(name)} (at most 255 bytes, no slash, backslash or control character)"
        )


def resolve_handler(handler: str, model_dir: Path) -> str:
    """The handler as it is to be loaded: archives of old packers name the file where it was on their machine.

    To be called for the `handler` of a register call too. A handler that does not exist passes, as with TorchServe:
    that shows when a worker starts.

    Raises:
        InvalidModel: a path that leaves the model directory, or a module of Python's own library.
    """
    file, colon, function = handler.partition(":")
    # Modules are imported by the last part of the path: the folders before it count only where they are there.
    name = os.path.basename(file)
    if name != file and not _module_is_at(model_dir / file.lstrip("/")) and _module_is_at(model_dir / name):
        file = name
    _check_inside("handler", file)
    module = name.partition(".")[0]
    folder = (model_dir / file).parent
    if module in sys.stdlib_module_names and not _module_is_at(folder / module) and not os.path.isdir(folder / module):
        raise InvalidModel(f"Handler is not allowed: {escape_name(handler)} (a module of Python, not of the model)")
    return f"{file}{colon}{function}"


def _module_is_at(path: Path) -> bool:
    """Whether there is a Python file of that path, `.py` written out or not."""
    # Of names that no file can have `Path.is_file` raises.
    return os.path.isfile(path.with_name(f"{path.name.removesuffix('.py')}.py")) if path.name else False


def read_manifest(directory: Path, model_name: str | None, limits: ArchiveLimits) -> Manifest:
    """The directory's checked manifest; TorchServe's default one where it has none and a name is given.

    Raises:
        InvalidModel: it is wrong, names something outside `directory`, or there is no name.
    """
    path = directory / MANIFEST_PATH
    if os.path.lexists(path):
        manifest = parse_manifest(path, model_name=model_name, max_bytes=limits.max_manifest_bytes)
        return _with_files_inside(manifest, directory)
    if not model_name:
        raise InvalidModel("Model name is not defined.")
    return Manifest(model_name)


def _with_files_inside(manifest: Manifest, directory: Path) -> Manifest:
    """The manifest with its files as they are called in `directory`; handlers see them so, too."""
    given = {key: getattr(manifest, name) for key, name in _FILES.items()}
    inside = {key: _files_inside(key, value, directory) for key, value in given.items() if value}
    changed = {key: value for key, value in inside.items() if value != given[key]}
    raw = manifest.raw if not changed else {**manifest.raw, "model": {**manifest.raw["model"], **changed}}
    handler = resolve_handler(manifest.handler, directory) if manifest.handler else manifest.handler
    files: dict[str, Any] = {_FILES[key]: value for key, value in inside.items()}
    return replace(manifest, handler=handler, raw=raw, **files)


def _files_inside(key: str, value: str, directory: Path) -> str:
    """The files that an entry names, below `directory`; TorchServe's readers accept a list, comma separated.

    A path of the packer's machine stands for the file of that name in the archive.
    """
    found = []
    for part in value.split(","):
        path = PurePosixPath(part.strip())
        is_elsewhere = path.is_absolute() or ".." in path.parts
        if is_elsewhere and not _UNSAFE_NAME.search(path.name) and os.path.isfile(directory / path.name):
            found.append(path.name)
        else:
            _check_inside(key, part.strip())
            found.append(part)
    return ",".join(found)


def _check_inside(key: str, value: str) -> None:
    path = PurePosixPath(value)
    has_unsafe = "\\" in value or _UNSAFE_NAME.search(value.replace("/", "")) is not None
    if has_unsafe or path.is_absolute() or ".." in path.parts:
        raise InvalidModel(f"Manifest entry {key} leaves the model directory: {escape_name(value)}")


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file that an archive brought along, read as TorchServe's parser reads it.

    Raises:
        ValueError: it is no regular file, larger than `max_bytes`, no JSON, nested too deep, or no object.
    """
    content = read_small_file(path, max_bytes)
    if content is None:
        raise ValueError(f"not a file of at most {max_bytes} bytes")
    raw = parse_lenient(content.decode("utf-8"), max_depth=_MAX_JSON_DEPTH)
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    return raw


def read_small_file(path: Path, max_bytes: int) -> bytes | None:
    """The bytes of a regular file, None where it is none, unreadable or larger than `max_bytes`."""
    try:
        # Without O_NONBLOCK a fifo that poses as the file would hold us up for ever.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            content = file.read(max_bytes + 1)
    except OSError:
        return None
    return content if len(content) <= max_bytes else None


def text_of(section: dict[str, Any], key: str) -> str | None:
    """A text of a manifest; a number is taken as it was written, as TorchServe's parser does.

    Raises:
        ValueError: there is something else; the text names the key.
    """
    value = section.get(key)
    try:
        return None if value is None else to_text(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


class YamlSettings(dict[str, Any]):
    """The settings of a YAML file, and where they stand in it.

    Attributes:
        name: the file's name, for people.
        lines: the line of each key from 1; keys of a section as `section.key`.
    """

    name: str = "model-config.yaml"
    lines: Mapping[str, int] = MappingProxyType({})

    def place(self, key: str) -> str:
        """File and line of a key, for messages ("model-config.yaml:3")."""
        return f"{self.name}:{self.lines[key]}" if key in self.lines else self.name

    def where(self, key: str) -> str:
        """File, line and key, as errors of config.properties name them ("model-config.yaml:3: key minWorkers")."""
        return f"{self.place(key)}: key {key}"


def load_model_yaml(path: Path) -> YamlSettings:
    """The settings of a model-config.yaml; empty, with one line in the log, where they cannot be read or are larger.

    Only plain data is built. Aliases may not blow the document up to more than 100 000 values.
    """
    max_bytes = DEFAULT_LIMITS.max_config_bytes
    try:
        content = read_small_file(path, max_bytes)
        if content is None:
            raise ValueError(f"not a readable file of at most {max_bytes} bytes")
        loader = yaml.SafeLoader(content)
        try:
            node = loader.get_single_node()
            if node is None:
                return YamlSettings()
            expanded_nodes(node, {}, 0)
            lines = dict(_lines(node))
            fields = loader.construct_document(node)
        finally:
            loader.dispose()
        if not isinstance(fields, dict):
            raise ValueError("the document is not a mapping of keys to values")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        log.error("Failed to parse model config file %s: %s", path, error)
        return YamlSettings()
    settings = YamlSettings(fields)
    settings.name, settings.lines = path.name, lines
    return settings


def _lines(node: yaml.Node, section: str = "") -> Iterator[tuple[str, int]]:
    """The line of each key of a mapping, and of the sections in it; of a key that is there twice, the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{section}{key.value}", key.start_mark.line + 1
                if not section:
                    yield from _lines(value, f"{key.value}.")


def expanded_nodes(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values `node` stands for once every alias is written out."""
    if depth > _MAX_YAML_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_YAML_DEPTH} levels, or an alias to itself")
    if id(node) in known:
        return known[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    count = 1 + sum(expanded_nodes(child, known, depth + 1) for child in children)
    if count > _MAX_YAML_NODES:
        raise ValueError(f"more than {_MAX_YAML_NODES} values, aliases written out")
    known[id(node)] = count
    return count
