"""A page of docs/ as its reader goes through it: its blocks in order, of which none may be left over."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from support.server import REPOSITORY


class Page:
    """The blocks of a page of docs/."""

    def __init__(self, name: str) -> None:
        text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        self._name = name
        self._blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)

    def next(self, language: str, holding: str = "") -> str:
        """Returns the next block, which must be of this language ("" for none) and hold this text."""
        assert self._blocks, f"docs/{self._name} has no further block; {language} was expected"
        found, text = self._blocks.pop(0)
        assert found == language and holding in text, f"docs/{self._name}: {language} {holding} was expected:\n{text}"
        return str(text)

    def end(self) -> None:
        """Makes sure that nothing is left."""
        assert not self._blocks, f"docs/{self._name}: nobody has looked at:\n{self._blocks[0][1]}"


def commands(block: str) -> Iterator[str]:
    """The commands of a block: a line each, but where one goes on behind a backslash or in a quote."""
    begun = ""
    for line in block.splitlines(keepends=True):
        begun += line
        if not line.endswith("\\\n") and _is_whole(begun):
            if begun.strip():
                yield begun.strip()
            begun = ""
    assert not begun, f"a command without an end: {begun}"


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True
