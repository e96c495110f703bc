"""JSON as people write it by hand, and as TorchServe's parser (Gson, lenient) reads it.

On top of JSON: single quotes, words without quotes, `=` or `=>` for the colon, `;` for the comma, comments (`#`, `//`,
`/* */`), a comma before a closing bracket, a byte order mark, `TRUE` and the like in any case. A word that is neither
a keyword nor a number is a text. Numbers with a point or an exponent keep the text they were written with.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

_BLANK = re.compile(r"(?:[ \t\r\n\f]|//[^\r\n]*|#[^\r\n]*|/\*.*?\*/)*", re.DOTALL)
_WORD = re.compile(r"[^\s{}\[\]:,;=/\\#\"']+")
_QUOTED = {'"': re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL), "'": re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "\n": "\n"} | {mark: mark for mark in "\"'\\/"}
_COLON = re.compile(r"=>|[:=]")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_REAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_KEYWORDS = {"true": True, "false": False, "null": None}


class WrittenNumber(float):
    """A number with a point or an exponent; `text` is how it was written (`1.10`), for where a text is wanted."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        """Reads the text."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def parse_lenient(text: str, *, unique_keys: bool = False, max_depth: int = 100) -> Any:
    """Reads one JSON value, of at most `max_depth` levels of objects and lists in each other.

    With `unique_keys` a key that stands twice in one object is an error; else the last one counts.

    Raises:
        ValueError: it is no JSON even so; the message says what and where.
    """
    reader = _Reader(text.removeprefix("\ufeff"), unique_keys, max_depth)
    value = reader.value(0)
    reader.skip_blanks()
    if reader.at < len(reader.text):
        reader.fail("more text behind the value")
    return value


def join_surrogates(text: str) -> str:
    """The text with each character beyond U+FFFF as the one that is meant, where two escapes were written for it.

    Raises:
        UnicodeDecodeError: half of such a pair stands alone.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


class _Reader:
    """The text and how far it has been read."""

    def __init__(self, text: str, unique_keys: bool, max_depth: int) -> None:
        self.text = text
        self.at = 0
        self._unique_keys = unique_keys
        self._max_depth = max_depth

    def fail(self, reason: str) -> NoReturn:
        rest = self.text[self.at : self.at + 20]
        raise ValueError(f"{reason}, near {rest!r}" if rest else f"{reason}, at the end")

    def skip_blanks(self) -> None:
        match = _BLANK.match(self.text, self.at)
        self.at = match.end() if match is not None else self.at

    def _next(self) -> str:
        """The next character that says something, not taken yet; empty at the end."""
        self.skip_blanks()
        return self.text[self.at : self.at + 1]

    def value(self, depth: int) -> Any:
        if depth > self._max_depth:
            self.fail(f"nested deeper than {self._max_depth} levels")
        mark = self._next()
        if mark == "{":
            return self._object(depth)
        if mark == "[":
            return self._array(depth)
        if mark in _QUOTED:
            return self._quoted(mark)
        return _value_of_word(self._word("a value"))

    def _object(self, depth: int) -> dict[str, Any]:
        self.at += 1
        found: dict[str, Any] = {}
        while (mark := self._next()) != "}":
            key = self._quoted(mark) if mark in _QUOTED else self._word("a key or a closing brace")
            if key in found and self._unique_keys:
                self.fail(f"key {key!r} is there twice")
            self.skip_blanks()
            colon = _COLON.match(self.text, self.at)
            if colon is None:
                self.fail(f"a colon is missing after {key!r}")
            self.at = colon.end()
            found[key] = self.value(depth + 1)
            self._separator("}")
        self.at += 1
        return found

    def _array(self, depth: int) -> list[Any]:
        self.at += 1
        found = []
        while self._next() != "]":
            found.append(self.value(depth + 1))
            self._separator("]")
        self.at += 1
        return found

    def _separator(self, end: str) -> None:
        mark = self._next()
        if mark in (",", ";"):
            self.at += 1
        elif mark != end:
            self.fail(f"a comma or {end!r} is missing")

    def _word(self, wanted: str) -> str:
        match = _WORD.match(self.text, self.at)
        if match is None:
            self.fail(f"{wanted} is missing")
        self.at = match.end()
        return match[0]

    def _quoted(self, mark: str) -> str:
        match = _QUOTED[mark].match(self.text, self.at)
        if match is None:
            self.fail("a closing quote is missing")
        plain = _ESCAPE.sub(self._escaped, match[1])
        self.at = match.end()
        try:
            return join_surrogates(plain)
        except UnicodeDecodeError:
            self.fail("half of a surrogate pair in a text")

    def _escaped(self, match: re.Match[str]) -> str:
        escaped = match[1]
        if len(escaped) == 5:
            return chr(int(escaped[1:], 16))
        if escaped not in _ESCAPED:
            self.fail(f"there is no escape \\{escaped}")
        return _ESCAPED[escaped]


def _value_of_word(word: str) -> Any:
    if word.lower() in _KEYWORDS:
        return _KEYWORDS[word.lower()]
    if _INTEGER.fullmatch(word):
        return int(word)
    return WrittenNumber(word) if _REAL.fullmatch(word) else word
