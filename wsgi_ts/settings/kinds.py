"""What a setting is: its kind of value (how to read, check and carry it as JSON) and its row of the table.

The table itself is the `Config` dataclass (`wsgi_ts.settings.config`): one field for one key, declared with
`setting(...)`. Every kind's `parse` raises ValueError with half a sentence about the value ("'abc' is not a
whole number"); the reader of the file adds where it stood. UnclearValue is for values with which TorchServe starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsgi_ts.settings.address import Address, parse_address
from wsgi_ts.settings.model_entries import parse_models, parse_object

#: `yes`: the server obeys it; `none`: for old files, there is nothing that it could change.
Effect = Literal["yes", "none"]

_JAVA_INT_MAX = 2**31 - 1
_JAVA_LONG_MAX = 2**63 - 1


class UnclearValue(ValueError):
    """A value that cannot be meant, with which TorchServe starts all the same: warned of, and no reason to stop.

    Attributes:
        instead: what it is taken for; None for the key's default.
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
        parse: from the text in a file or the environment to the value; raises ValueError.
        encode: to something that json can write.
        decode: back from it.
        empty_is_unset: an empty text means that nothing is set, as it does for a list or a name.
        empty_is_value: an empty text is a value as others are: an empty list, where the default is not.
    """

    name: str
    parse: Callable[[str], Any]
    encode: Callable[[Any], Any] = _as_is
    decode: Callable[[Any], Any] = _as_is
    empty_is_unset: bool = False
    empty_is_value: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the settings table, without its name and default, which are the dataclass field's.

    Attributes:
        kind: the kind of value.
        help: one line for the reference page.
        env: the environment variable that sets it (with `enable_envvars_config`), None where none may.
        env_always: the variable counts even without `enable_envvars_config`.
        is_key: whether it is a key of config.properties (else the launcher fills it in).
        ours: a key that TorchServe does not know.
        effect: whether the server obeys it.
    """

    kind: Kind
    help: str
    env: str | None = None
    env_always: bool = False
    is_key: bool = True
    ours: bool = False
    effect: Effect = "yes"


def setting(
    kind: Kind,
    default: Any,
    help: str,
    *,
    env: bool | str = True,
    env_always: bool = False,
    ours: bool = False,
    effect: Effect = "yes",
) -> Any:
    """Declares a dataclass field that is a key of config.properties.

    Args:
        kind: the kind of value.
        default: the value where nobody gives one.
        help: one line for the reference page.
        env: True for `TS_{KEY}`, a name for another variable, False for none.
        env_always: obey that variable even without `enable_envvars_config`.
        ours: a key that TorchServe does not know.
        effect: whether the server obeys the key.
    """
    variable = env if isinstance(env, str) else "" if env else None
    return _field(default, Setting(kind, help, variable, env_always, True, ours, effect))


def launch_value(kind: Kind, default: Any, help: str) -> Any:
    """Declares a dataclass field which the launcher fills in; no key of config.properties."""
    return _field(default, Setting(kind, help, is_key=False))


def _field(default: Any, row: Setting) -> Any:
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"setting": row})
    return field(default=default, metadata={"setting": row})


def is_true(text: str) -> bool:
    """Whether Java's `Boolean.parseBoolean` takes the text for true: the word in any case, without a blank."""
    return text.lower() == "true"


def _parse_boolean(text: str) -> bool:
    if not is_true(text) and text.strip().lower() != "false":
        raise UnclearValue(f"{text!r} is neither true nor false", False)
    return is_true(text)


def _parse_float(text: str) -> float:
    # Python would take 1_000 and what Unicode calls digits, too.
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is None:
        raise UnclearValue(f"{text!r} is not a number")
    number = float(text)
    if not 0 < number < _JAVA_INT_MAX:
        raise ValueError(f"{text} is not a number above 0")
    return number


def _parse_header_name(text: str) -> str:
    if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", text) is None:
        raise UnclearValue(f"{text!r} cannot be the name of a header")
    return text


def _parse_header_value(text: str) -> str:
    if re.fullmatch(r"[\t -~\x80-\xff]*", text) is None:
        raise ValueError(f"{text!r} cannot be the value of a header")
    return text


def _parse_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _absolute(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _encode_path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _decode_path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def integer(minimum: int = 0, maximum: int = _JAVA_INT_MAX, unit: str = "") -> Kind:
    """A whole number between the two limits, both allowed; `unit` is for the name only."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text) is None:
            raise ValueError(f"{text!r} is not a whole number")
        number = int(text)
        if not minimum <= number <= maximum:
            raise ValueError(f"{text} is not between {minimum} and {maximum}")
        return number

    return Kind(f"whole number{', ' + unit if unit else ''}", parse)


def choice(*words: str, or_default: bool = False) -> Kind:
    """One of some words, in any case.

    Args:
        words: the words.
        or_default: another word is warned of and the default counts, since TorchServe starts with it.
    """

    def parse(text: str) -> str:
        lowered = text.lower()
        if lowered not in words:
            reason = f"{text!r} is none of: {', '.join(words)}"
            raise UnclearValue(reason) if or_default else ValueError(reason)
        return lowered

    return Kind(" | ".join(words), parse)


def address(default_port: int, default_tls_port: int) -> Kind:
    """A listening address; the ports are for texts that name none."""

    def parse(text: str) -> Address:
        return parse_address(text, (default_port, default_tls_port))

    return Kind("address", parse, str, parse_address)


def _parse_oip(text: str) -> bool:
    return text.strip().lower() == "oip" or _parse_boolean(text)


def _parse_model_list(text: str) -> tuple[tuple[str | None, str], ...]:
    entries: list[tuple[str | None, str]] = []
    for item in filter(None, map(str.strip, text.split(","))):
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
    return tuple(_parse_regex(part.strip()) for part in text.split(",") if part.strip())


def _parse_modules(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, map(str.strip, text.split(","))))
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is not the name of a Python module")
    return names


TEXT = Kind("text", _as_is, empty_is_unset=True)
BOOLEAN = Kind("true | false", _parse_boolean)
OIP = Kind("true | false | oip", _parse_oip)
NUMBER = Kind("number above 0", _parse_float)
PATH = Kind("path", _absolute, _encode_path, _decode_path)
HEADER_NAME = Kind("name of a header", _parse_header_name)
HEADER_VALUE = Kind("text", _parse_header_value, empty_is_unset=True)
REGEX = Kind("regular expression", _parse_regex, empty_is_unset=True)
JSON_OBJECT = Kind("JSON object", parse_object)
MODELS = Kind("JSON object", parse_models)
SIZE = integer(1, unit="bytes")
LONG = integer(1, _JAVA_LONG_MAX, "ms")
PORT = integer(0, 65534, "port")
URL_PATTERNS = Kind("regular expressions, comma separated", _parse_url_patterns, list, tuple, empty_is_unset=True)
MODULES = Kind("names of Python modules, comma separated", _parse_modules, list, tuple, empty_is_value=True)
MODEL_LIST = Kind(
    "all, or archive or name=archive, comma separated",
    _parse_model_list,
    lambda value: [list(entry) for entry in value],
    lambda value: tuple((name, url) for name, url in value),
    empty_is_unset=True,
)
LINES = Kind("lines of text", lambda text: tuple(text.splitlines()), list, tuple)
