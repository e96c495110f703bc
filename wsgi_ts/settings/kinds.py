"""Kinds of values: how each is read from what people write, checked, and carried as JSON.

A kind's `parse` raises ValueError with half a sentence about the value ("'abc' is not a whole number"); the reader of
the file adds where it stood. config.properties is read as strictly as TorchServe does (`integer`, `BOOLEAN`); in YAML
and JSON what loses nothing is converted (`whole`, `FLAG`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.address import Address, parse_address
from wsgi_ts.settings.conversion import shown, to_boolean, to_text, to_whole_number
from wsgi_ts.settings.model_entries import parse_models, parse_object

_JAVA_INT_MAX = 2**31 - 1
_JAVA_LONG_MAX = 2**63 - 1


class UnclearValue(ValueError):
    """A value that cannot be meant, with which TorchServe starts all the same: warned of, and no reason to stop.

    It is taken for `instead`, or where that is None for the key's default.
    """

    def __init__(self, reason: str, instead: Any = None) -> None:
        super().__init__(reason)
        self.instead = instead


def _as_is(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value.

    Attributes:
        name: for people ("whole number").
        parse: from the text in config.properties or the environment, or from what a YAML or JSON reader returned, to
            the value; raises ValueError.
        encode: to something that json can write.
        decode: back from it.
        empty: what an empty text means: `unset` (nothing is given, as for a name), `value` (an empty list, where the
            default is not) or `warned` (nothing is given, with a warning).
        json_type: the type in an OpenAPI schema.
    """

    name: str
    parse: Callable[[Any], Any]
    encode: Callable[[Any], Any] = _as_is
    decode: Callable[[Any], Any] = _as_is
    empty: Literal["unset", "value", "warned"] = "warned"
    json_type: Literal["string", "integer", "boolean"] = "string"


def is_true(text: str) -> bool:
    """Whether Java's `Boolean.parseBoolean` takes the text for true: the word in any case, without a blank."""
    return text.lower() == "true"


def _parse_boolean(text: str) -> bool:
    if not is_true(text) and text.strip().lower() != "false":
        raise UnclearValue(f"{text!r} is neither true nor false", False)
    return is_true(text)


def _parse_oip(text: str) -> bool:
    return text.strip().lower() == "oip" or _parse_boolean(text)


def _parse_float(text: str) -> float:
    # Python would take 1_000 and what Unicode calls digits, too.
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is None:
        raise UnclearValue(f"{text!r} is not a number")
    number = float(text)
    if not 0 < number < _JAVA_INT_MAX:
        raise ValueError(f"{text} is not a number above 0")
    return number


def _parse_ratio(text: str) -> float:
    number = 0.0 if re.fullmatch(r"0+(\.0*)?", text) else _parse_float(text)
    if number > 1.0:
        raise ValueError(f"{text} is not a number from 0 to 1")
    return number


def _parse_digits(text: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text) is None:
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def integer(
    minimum: int = 0,
    maximum: int = _JAVA_INT_MAX,
    unit: str = "",
    *,
    lift: bool = False,
    read: Callable[[Any], int] = _parse_digits,
) -> Kind:
    """A whole number between two limits, both allowed; `unit` is for the name only.

    With `lift` a smaller number is lifted to `minimum`, and not refused. `read` makes it a number, or raises
    ValueError.
    """

    def parse(value: Any) -> int:
        number = read(value)
        if lift:
            number = max(minimum, number)
        if not minimum <= number <= maximum:
            raise ValueError(f"{number} is not between {minimum} and {maximum}")
        return number

    return Kind(f"whole number{', ' + unit if unit else ''}", parse, json_type="integer")


def whole(minimum: int = 0, unit: str = "", *, lift: bool = False) -> Kind:
    """A whole number of a YAML or JSON file; `"3"` and `3.0` are 3."""
    return integer(minimum, unit=unit, lift=lift, read=to_whole_number)


def choice(*words: str, or_default: bool = False) -> Kind:
    """One of some words, in any case; an empty one is not shown to people.

    With `or_default` another word is warned of and the default counts, since TorchServe starts with it.
    """
    named = [word for word in words if word]

    def parse(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else None
        if word not in words:
            reason = f"{shown(value)} is none of: {', '.join(named)}"
            raise UnclearValue(reason) if or_default else ValueError(reason)
        return word

    return Kind(" | ".join(named), parse)


def address(default_port: int, default_tls_port: int) -> Kind:
    """A listening address; the ports are for texts that name none."""

    def parse(text: str) -> Address:
        return parse_address(text, (default_port, default_tls_port))

    return Kind("address", parse, str, parse_address)


def _header(pattern: str, fault: str, error: type[ValueError] = ValueError) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise error(f"{text!r} cannot be the {fault}")
        return text

    return parse


def _parse_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _parse_path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


#: Blanks behind an archive: a shell variable in quotes has all names of its list in one word.
_AFTER_ARCHIVE = re.compile(r"(?<=\.mar|\.war)\s+|(?<=\.model)\s+|(?<=\.tar\.gz)\s+")


def _parse_model_list(text: str) -> tuple[tuple[str | None, str], ...]:
    entries: list[tuple[str | None, str]] = []
    for item in _words(_AFTER_ARCHIVE.sub(",", text)):
        name, equals, url = item.partition("=")
        # A URL may carry a "=" of its own (query): a name never has a "/" or ":" in it.
        if equals and "/" not in name and ":" not in name:
            if not name.strip() or not url.strip():
                raise ValueError(f"{item!r} is not of the form name=archive")
            entries.append((name.strip(), url.strip()))
        else:
            entries.append((None, item))
    return tuple(entries)


def _parse_url_patterns(text: str) -> tuple[str, ...]:
    return tuple(map(_parse_regex, _words(text)))


def _parse_modules(text: str) -> tuple[str, ...]:
    names = _words(text)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is not the name of a Python module")
    return names


def _parse_object_names(text: str) -> tuple[str, ...]:
    names = _words(text)
    for name in names:
        module, colon, attribute = name.partition(":")
        if not colon or not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
            raise ValueError(f"{name!r} is not of the form module:attribute")
    return names


def _parse_device_ids(value: Any) -> tuple[int, ...]:
    numbers = tuple(map(to_whole_number, value if isinstance(value, list) else [value]))
    if any(number < 0 for number in numbers):
        raise ValueError(f"{shown(value)} is not a list of GPU numbers from 0")
    return numbers


def _parse_section(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not a section of settings")
    return value


TEXT = Kind("text", to_text, empty="unset")
BOOLEAN = Kind("true | false", _parse_boolean, json_type="boolean")
FLAG = Kind("true | false", to_boolean, json_type="boolean")
OIP = Kind("true | false | oip", _parse_oip)
NUMBER = Kind("number above 0", _parse_float)
RATIO = Kind("number from 0 to 1", _parse_ratio)
PATH = Kind("path", _parse_path, str, Path)
HEADER_NAME = Kind("name of a header", _header(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", "name of a header", UnclearValue))
HEADER_VALUE = Kind("text", _header(r"[\t -~\x80-\xff]*", "value of a header"), empty="unset")
REGEX = Kind("regular expression", _parse_regex, empty="unset")
JSON_OBJECT = Kind("JSON object", parse_object)
MODELS = Kind("JSON object", parse_models)
SIZE = integer(1, unit="bytes")
LONG = integer(1, _JAVA_LONG_MAX, "ms")
PORT = integer(0, 65534, "port")
#: A number of a call: any of 32 bits with a sign, as TorchServe takes it.
INT32 = integer(-(2**31), read=to_whole_number)
URL_PATTERNS = Kind("regular expressions, comma separated", _parse_url_patterns, list, tuple, "unset")
MODULES = Kind("names of Python modules, comma separated", _parse_modules, list, tuple, "value")
OBJECTS = Kind("module:attribute, comma separated", _parse_object_names, list, tuple, "unset")
NAMES = Kind("names, comma separated", _words, list, tuple, "unset")
MODEL_LIST = Kind(
    "all, or archive or name=archive, comma separated",
    _parse_model_list,
    lambda value: [list(entry) for entry in value],
    lambda value: tuple((name, url) for name, url in value),
    "unset",
)
LINES = Kind("lines of text", lambda text: tuple(text.splitlines()), list, tuple)
ROWS = Kind("rows", tuple, list, tuple)
DEVICE_IDS = Kind("list of GPU numbers", _parse_device_ids)
SECTION = Kind("section", _parse_section)
