"""Values of files that people write, in the type that is wanted: what loses nothing is converted, the rest refused.

`"3"`, `3.0` and `" 3 "` are the number 3, `"True"` is true, the number `1.10` is the text `1.10`. A value that does not
fit is never taken for a default here: the caller gets a ValueError with half a sentence about the value, and adds where
it stood.
"""

from __future__ import annotations

import re
from typing import Any

from wsgi_ts.settings.lenient_json import WrittenNumber

_WHOLE = re.compile(r"([+-]?[0-9]{1,19})(?:\.0*)?")
_LARGEST = 2**63


def to_whole_number(value: Any) -> int:
    """The whole number that `value` is or spells; raises ValueError where it is none."""
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip())
        if match is not None:
            return int(match[1])
    elif isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST:
        whole = int(value)
        if whole == value:
            return whole
    raise ValueError(f"{shown(value)} is not a whole number")


def to_boolean(value: Any) -> bool:
    """The boolean that `value` is or spells, in any case; raises ValueError where it is none."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is True or word == "true":
        return True
    if word is False or word == "false":
        return False
    raise ValueError(f"{shown(value)} is neither true nor false")


def to_text(value: Any) -> str:
    """The text that `value` is, or by which a number or boolean was written; raises ValueError for all else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"{shown(value)} is not a text")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(float(value)) if isinstance(value, WrittenNumber) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
