"""What a user asks of a model: limits for its latency, such as `p99=50ms,p50=10ms`.

The words are those of Triton's model analyzer in short: percentiles, `avg` and `max` of the latency are constraints,
the throughput within them is what is maximised.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_TERM = re.compile(
    r"(?P<name>p[0-9]{1,2}(?:\.[0-9]+)?|avg|max)(?:<=|=|<)(?P<value>[0-9]+(?:\.[0-9]+)?)(?P<unit>us|ms|s)"
)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_WORDS = {"avg": 0.0, "max": 100.0}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile of sorted numbers; infinite where there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else math.inf


@dataclass(frozen=True)
class Term:
    """One limit.

    Attributes:
        text: as the user wrote it.
        percent: the percentile that it is for; 0: the mean, 100: the largest.
        limit_s: in seconds.
    """

    text: str
    percent: float
    limit_s: float

    def value_s(self, ordered: Sequence[float]) -> float:
        """What it limits, of sorted latencies in seconds."""
        return sum(ordered) / len(ordered) if ordered and self.percent == 0 else percentile(ordered, self.percent)

    def share(self, ordered: Sequence[float]) -> float:
        """The part of what is asked for that sorted latencies come to; 1 where the limit is kept."""
        if not ordered:
            return 0.0
        if self.percent == 0:
            return min(1.0, self.limit_s / self.value_s(ordered))
        within = bisect_right(ordered, self.limit_s) / len(ordered)
        return min(1.0, within / (self.percent / 100))


@dataclass(frozen=True)
class Objective:
    """All limits of a tuning."""

    terms: tuple[Term, ...]

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return ",".join(term.text for term in self.terms)

    @property
    def longest_s(self) -> float:
        """No batch may take longer than this, in seconds."""
        return max(term.limit_s for term in self.terms)

    def holds(self, ordered: Sequence[float]) -> bool:
        """Whether sorted latencies, in seconds, keep all limits."""
        return bool(ordered) and all(term.value_s(ordered) <= term.limit_s for term in self.terms)

    def broken(self, ordered: Sequence[float]) -> list[Term]:
        """The limits that sorted latencies do not keep."""
        return [term for term in self.terms if not term.value_s(ordered) <= term.limit_s]

    def share(self, ordered: Sequence[float]) -> float:
        """The part of the answers that counts: all of them where all limits are kept.

        Where 95 % of the answers come within the limit of `p99`, 95 of each 99 count.
        """
        return min(term.share(ordered) for term in self.terms)


def parse_objective(texts: Sequence[str]) -> Objective:
    """Reads the values of `--slo`.

    Raises:
        ValueError: one of them is none; the text says what it should be.
    """
    terms: dict[float, Term] = {}
    for part in ",".join(texts).split(","):
        text = part.strip().replace(" ", "")
        match = _TERM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"--slo {part.strip()!r}: write limits of the latency as p99=50ms; p50, p99.9, avg and max are others, "
                "us, ms and s the units, and several stand behind commas"
            )
        name = match["name"]
        percent = _WORDS[name] if name in _WORDS else float(name[1:])
        limit_s = float(match["value"]) * _UNITS[match["unit"]]
        if limit_s <= 0 or (percent == 0.0 and name != "avg"):
            raise ValueError(f"--slo {text}: a limit is more than 0, and percentiles begin above p0")
        if percent in terms:
            raise ValueError(f"--slo {text}: {terms[percent].text} is said already")
        terms[percent] = Term(text, percent, limit_s)
    return Objective(tuple(terms.values()))
