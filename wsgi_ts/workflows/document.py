"""A YAML file as plain data, with the line of each key: what is wrong in it can be said with its place."""

from __future__ import annotations

import re
from typing import Any

import yaml

from wsgi_ts.archive.manifest import expanded_nodes
from wsgi_ts.quick_dataclass import dataclass

#: The keys that lead to a value from the top of the document.
Keys = tuple[Any, ...]

_MAX_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
#: Larger numbers cannot be told in a message (Python writes no number of more than 4300 digits).
_MOST_BITS = 4096
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class NoYaml(ValueError):
    """The text is no YAML, or more than anybody writes; the message says where."""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    Attributes:
        data: its content: mappings, lists, texts, numbers, booleans, dates and None.
        lines: the line of each key, from 1, by the keys that lead to it.
        duplicates: keys that stand twice in one mapping, the last of which counts, with the line of the first.
    """

    name: str
    data: Any
    lines: dict[Keys, int]
    duplicates: tuple[tuple[Keys, int], ...] = ()

    def place(self, *keys: Any) -> str:
        """File and line of a key ("spec.yaml:12"), or of the innermost section around it that is there."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.lines:
                return f"{self.name}:{self.lines[keys[:length]]}"
        return self.name

    def where(self, *keys: Any) -> str:
        """File, line and key, as other messages about settings name them ("spec.yaml:12: key models.m1.url")."""
        return f"{self.place(*keys)}: key {'.'.join(map(str, keys))}"


def read_document(text: str, name: str) -> Document:
    """Reads one YAML document. Of a key that stands twice the last counts, at the last's place. `name` is for messages.

    Raises:
        NoYaml: it is none, builds more than plain data, or has over a megabyte or 100 000 values with aliases
            written out.
    """
    if len(text) > _MAX_BYTES:
        raise NoYaml(f"{name}: more than {_MAX_BYTES} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(name, None, {})
            expanded_nodes(node, {}, 0)
            reader = _Reader(loader, name)
            return Document(name, reader.value(node, ()), reader.lines, tuple(reader.duplicates))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise NoYaml(f"{name}{line}: {error.problem or error.context}") from error
    except NoYaml:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise NoYaml(f"{name}: {error}") from error


class _Reader:
    """Turns the nodes of a document into data, and notes where the keys stand."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.lines: dict[Keys, int] = {}
        self.duplicates: list[tuple[Keys, int]] = []
        self._loader = loader
        self._name = name

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        """The data of a node that `keys` lead to."""
        if node.tag in _PLAIN_TAGS and isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if node.tag in _PLAIN_TAGS and isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*keys, number)) for number, item in enumerate(node.value)]
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        """The data of a node that is no plain mapping or list.

        Raises:
            NoYaml: it is none, a text with half of a surrogate pair, which nothing can be sent with, or a number beyond
                use.
        """
        place = f"{self._name}:{node.start_mark.line + 1}"
        try:
            value = self._loader.construct_object(node, deep=True)
        except (ValueError, OverflowError) as error:
            raise NoYaml(f"{place}: {error}") from error
        if isinstance(value, str) and _SURROGATE.search(value):
            raise NoYaml(f"{place}: a text with half of a surrogate pair")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise NoYaml(f"{place}: a number of more than {_MOST_BITS} bits")
        return value

    def _key(self, node: yaml.Node) -> Any:
        """The data of a key.

        Raises:
            NoYaml: it is none, or a list or mapping, by which nothing can be found.
        """
        key = self._scalar(node)
        try:
            hash(key)
        except TypeError as error:
            raise NoYaml(f"{self._name}:{node.start_mark.line + 1}: a key that is a list or a mapping") from error
        return key

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[Any, Any]:
        self._loader.flatten_mapping(node)
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            path = (*keys, key)
            if key in found:
                self.duplicates.append((path, self.lines[path]))
                del found[key]
            self.lines[path] = key_node.start_mark.line + 1
            found[key] = self.value(value_node, path)
        return found
