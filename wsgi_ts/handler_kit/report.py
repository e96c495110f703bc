"""What a check or a replay has found, line by line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """Lines for people, and whether all is well.

    Attributes:
        lines: what was found, each begun with OK, WARN or FAIL.
        is_good: false once something has failed.
    """

    lines: list[str] = field(default_factory=list)
    is_good: bool = True

    def ok(self, text: str) -> None:
        """Notes what is as it should be."""
        self.lines.append(f"OK    {text}")

    def warn(self, text: str) -> None:
        """Notes what works, but not as its author may think."""
        self.lines.append(f"WARN  {text}")

    def fail(self, text: str) -> None:
        """Notes what is wrong."""
        self.lines.append(f"FAIL  {text}")
        self.is_good = False
