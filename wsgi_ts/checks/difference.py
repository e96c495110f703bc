"""One thing that will be otherwise here than with TorchServe."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from wsgi_ts.quick_dataclass import dataclass

Level = Literal["FAIL", "WARN", "NOTE"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One finding of `wsgi-ts doctor --migrate`.

    Attributes:
        level: FAIL: the server does not start, or the model is not served; WARN: it is, but not as it was; NOTE: it
            differs, and nothing need be done.
        where: file, and line or key.
    """

    level: Level
    where: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{self.level}  {self.where}: {self.text}" + (f"; {self.advice}" if self.advice else "")

    def to_json(self) -> dict[str, str]:
        """Its fields."""
        return asdict(self)
