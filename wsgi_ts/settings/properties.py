r"""Java's properties syntax, in which config.properties is written.

`key=value`, `key: value` or `key value`; comments with `#` or `!`; a backslash at the end of a line continues
it; the escapes `\t \n \r \f \uXXXX`, and a backslash before any other character for the character itself.
Files are UTF-8 (with or without byte order mark); one that is not is read as Latin-1, as Java reads all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from wsgi_ts.quick_dataclass import dataclass
from wsgi_ts.settings.lenient_json import join_surrogates

_BLANKS = " \t\f"
_LINE_END = re.compile(r"\r\n|\r|\n")
_KEY_AND_VALUE = re.compile(r"((?:[^\\=: \t\f]|\\.)*)[ \t\f]*[=:]?[ \t\f]*(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_CONTROL_NAMES = {character: name for name, character in _CONTROL.items()}
#: What needs a backslash: in a value a blank at its beginning, which would be none of it; in a key every one, as it
#: would end there.
_SPECIAL = re.compile(r"[\\\t\n\r\f=:#!]|\A ")
_SPECIAL_IN_KEYS = re.compile(r"[\\\t\n\r\f=:#! ]")
_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")


class PropertiesError(ValueError):
    """A line that is not in this syntax; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True, slots=True)
class Property:
    """One key with its value, and the line on which it begins."""

    key: str
    value: str
    line: int


def parse_properties(data: bytes) -> list[Property]:
    r"""Reads a whole file, keys in the order of the file, repeated ones included (the last one counts).

    Raises:
        PropertiesError: a NUL byte, or a malformed `\u` escape.
    """
    text = _decode(data)
    lines = _LINE_END.split(text)
    found = []
    number = 0
    while number < len(lines):
        first = number
        line = lines[number].lstrip(_BLANKS)
        number += 1
        if not line or line[0] in "#!":
            continue
        parts = []
        while _is_continued(line):
            parts.append(line[:-1])
            line = lines[number].lstrip(_BLANKS) if number < len(lines) else ""
            number += 1
        parts.append(line)
        match = _KEY_AND_VALUE.fullmatch("".join(parts))
        if match is not None:
            key, value = (_unescape(part, first + 1) for part in match.groups())
            found.append(Property(key, value, first + 1))
    return found


def format_property(key: str, value: str) -> str:
    r"""One line `key=value` that reads back as what it was, for Java too (non-ASCII characters as `\uXXXX`)."""
    return f"{_escape(key, _SPECIAL_IN_KEYS)}={_escape(value, _SPECIAL)}"


def substitute_variables(value: str, environ: Mapping[str, str]) -> str:
    """Puts the variable NAME where the value says `$$NAME$$`; raises ValueError where there is no such variable."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ValueError(f"Invalid Environment Variable {match[1]}")
        return environ[match[1]]

    return _VARIABLE.sub(replacement, value)


def _escape(text: str, special: re.Pattern[str]) -> str:
    escaped = special.sub(lambda match: "\\" + _CONTROL_NAMES.get(match[0], match[0]), text)
    if escaped.isascii():
        return escaped
    units = escaped.encode("utf-16-be", "surrogatepass")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if code < 128 else f"\\u{code:04X}" for code in codes)


def _decode(data: bytes) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise PropertiesError(data.count(b"\n", 0, nul) + 1, "there is a NUL byte; this is no text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _is_continued(line: str) -> bool:
    """Whether the line ends with an odd number of backslashes: the last one is then not an escaped one."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _unescape(text: str, line: int) -> str:
    def replacement(match: re.Match[str]) -> str:
        escaped = match[1]
        if len(escaped) == 5:
            return chr(int(escaped[1:], 16))
        if escaped == "u":
            raise PropertiesError(line, "malformed \\u escape: four hexadecimal digits must follow")
        return _CONTROL.get(escaped, escaped)

    if "\\" not in text:
        return text
    try:
        return join_surrogates(_ESCAPE.sub(replacement, text))
    except UnicodeDecodeError:
        raise PropertiesError(line, "half of a surrogate pair in a \\u escape") from None
