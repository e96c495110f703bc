"""The section `options` of a workflow's specification: what TorchServe's workflows cannot do, and ignore.

```yaml
options:
  timeout-ms: 30000
  nodes:
    breed: {when: is_dog}
    second_opinion: {optional: true}
    score: {on-error: default, default: {"score": 0}}
    download: {on-error: tell}
    split: {scatter: true}
    join: {gather: true, pass: [request]}
    encoder: {model: minilm/2.0}
    tokens: {batch-size: 16}
```
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from wsgi_ts.errors import InvalidDag
from wsgi_ts.models.arguments import MAX_BATCH_SIZE
from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.conversion import shown
from wsgi_ts.workflows.document import Document

OnError = Literal["fail", "skip", "default", "tell"]

_ON_ERROR = ("fail", "skip", "default", "tell")
_FUNCTION = re.compile(r"[^\W\d]\w*")
_MAX_TIMEOUT_MS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SharedModel:
    """A registered model that a node uses, in place of loading one of its own.

    Attributes:
        version: the version; None for whichever is the default one when a request comes.
    """

    name: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What `options.nodes` says of one node.

    Attributes:
        when: a function of the handler file, called with what the node would get: the node runs where it returns
            something true, else it is skipped. What a skipped node alone feeds is skipped too; a node with other
            parents runs without its key. Where a leaf is skipped, the last node before it that ran answers.
        on_error: what becomes of a request when the node has failed in all its attempts: it fails, the node is
            skipped, `default` is its answer, or the request fails with the status and text of the node's error.
        default: the answer of `on_error` "default", as YAML data: a text, or what becomes JSON.
        optional: the workflow is registered, and answers, without the node too: it is skipped where its model could
            not be loaded, has no worker, or fails.
        scatter: the node's answer is a list (of a model, a JSON array): what follows, up to the node with `gather`,
            runs once for each item.
        gather: the node gets the answers of all items, in order, as a list; None for an item without one.
        model: the registered model that the node uses.
        pass_request: the node gets the client's fields as well, as `request.<field>` (a plain body: `request.body`).
        batch_size: requests that a function is given at once; None for one.
    """

    when: str | None = None
    on_error: OnError = "fail"
    default: Any = None
    optional: bool = False
    scatter: bool = False
    gather: bool = False
    model: SharedModel | None = None
    pass_request: bool = False
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """The whole section.

    Attributes:
        timeout_ms: how long a request may take as a whole; 0 where that is not said.
    """

    nodes: Mapping[str, NodeOptions]
    timeout_ms: int = 0


NO_OPTIONS = NodeOptions()


def read_options(document: Document, nodes: Mapping[str, object]) -> Options:
    """Reads the section, which need not be there, for the names of the graph's nodes.

    Raises:
        InvalidDag: with key and line.
    """
    section = document.data.get("options")
    if section is None:
        return Options({})
    _check_mapping(document, section, "options")
    _check_keys(document, section, ("nodes", "timeout-ms"), "options")
    timeout_ms = section.get("timeout-ms", 0)
    if "timeout-ms" in section and (type(timeout_ms) is not int or not 1 <= timeout_ms <= _MAX_TIMEOUT_MS):
        fault = f"{shown(timeout_ms)} is not a whole number between 1 and {_MAX_TIMEOUT_MS}"
        raise wrong(document, fault, "options", "timeout-ms")
    by_node = section.get("nodes")
    if by_node is None:
        return Options({}, timeout_ms)
    _check_mapping(document, by_node, "options", "nodes")
    found = {}
    for name, fields in by_node.items():
        if name not in nodes:
            raise wrong(document, "there is no node of that name in dag", "options", "nodes", name)
        _check_mapping(document, fields, "options", "nodes", name)
        found[name] = _NodeReader(document, name, fields).read()
    return Options(found, timeout_ms)


def wrong(document: Document, fault: str, *keys: Any) -> InvalidDag:
    """The error for a key: file, line and key, then what is wrong."""
    return InvalidDag(f"{document.where(*keys)}: {fault}", document.place(*keys))


def _check_mapping(document: Document, value: Any, *keys: Any) -> None:
    if not isinstance(value, dict):
        raise wrong(document, f"{shown(value)} is not a mapping of keys to values", *keys)


def _check_keys(document: Document, section: dict[Any, Any], known: tuple[str, ...], *keys: Any) -> None:
    for key in section:
        if key not in known:
            raise wrong(document, f"unknown; there are {', '.join(known)}", *keys, key)


class _NodeReader:
    """Reads the options of one node."""

    _KEYS = ("when", "on-error", "default", "optional", "scatter", "gather", "model", "pass", "batch-size")

    def __init__(self, document: Document, node: str, fields: dict[Any, Any]) -> None:
        self._document = document
        self._fields = fields
        self._keys = ("options", "nodes", node)
        _check_keys(document, fields, self._KEYS, *self._keys)

    def read(self) -> NodeOptions:
        optional = self._flag("optional")
        return NodeOptions(
            when=self._function("when"),
            on_error=self._on_error(optional),
            default=self._default(),
            optional=optional,
            scatter=self._flag("scatter"),
            gather=self._flag("gather"),
            model=self._model(),
            pass_request=self._pass(),
            batch_size=self._batch_size(),
        )

    def _wrong(self, key: str, fault: str) -> InvalidDag:
        return wrong(self._document, fault, *self._keys, key)

    def _flag(self, key: str) -> bool:
        value = self._fields.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, f"{shown(value)} is neither true nor false")
        return value

    def _text(self, key: str) -> str | None:
        if key not in self._fields:
            return None
        value = self._fields[key]
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, f"{shown(value)} is not a text")
        return value

    def _function(self, key: str) -> str | None:
        name = self._text(key)
        if name is not None and _FUNCTION.fullmatch(name) is None:
            raise self._wrong(key, f"{shown(name)} is not the name of a Python function")
        return name

    def _on_error(self, optional: bool) -> OnError:
        word = self._text("on-error")
        if word is None:
            return "skip" if optional else "fail"
        if word not in _ON_ERROR:
            raise self._wrong("on-error", f"{shown(word)} is none of: {', '.join(_ON_ERROR)}")
        if optional and word != "skip":
            raise self._wrong("on-error", f"an optional node is skipped when it fails: remove {word}, or optional")
        if (word == "default") != ("default" in self._fields):
            raise self._wrong("on-error", "on-error: default and the key default need each other")
        return cast("OnError", word)

    def _default(self) -> Any:
        if "default" not in self._fields:
            return None
        if self._fields.get("on-error") != "default":
            raise self._wrong("default", "on-error: default and the key default need each other")
        value = self._fields["default"]
        if not _is_json(value):
            raise self._wrong("default", f"{shown(value)} cannot be written as JSON")
        return value

    def _model(self) -> SharedModel | None:
        text = self._text("model")
        if text is None:
            return None
        name, slash, version = text.partition("/")
        if not name or "/" in version or (slash and not version):
            raise self._wrong("model", f"{shown(text)} is not a model's name, or name/version")
        return SharedModel(name, version or None)

    def _pass(self) -> bool:
        value = self._fields.get("pass", [])
        if not isinstance(value, list) or any(item != "request" for item in value):
            raise self._wrong("pass", f"{shown(value)} is not [request]")
        return bool(value)

    def _batch_size(self) -> int | None:
        value = self._fields.get("batch-size")
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_BATCH_SIZE):
            raise self._wrong("batch-size", f"{shown(value)} is not a whole number between 1 and {MAX_BATCH_SIZE}")
        return value


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)
