"""Which requests are worth a record: the slowest of each model in the present minute, and those above a limit.

What most requests meet of it is one look into a dictionary: records are made of the few that pass.
"""

from __future__ import annotations

import heapq
from typing import Final

WINDOW_S: Final = 60.0
#: Longer than any request.
_NEVER_NS: Final = 1 << 62


class Slowest:
    """The times from which on a request of a model is kept.

    Args:
        most: so many of each model in a minute; 0: none for being among the slowest.
        limit_ms: what takes longer is kept in any case; 0: no limit.

    Attributes:
        thresholds: by model, how long a request has to take (ns); of a model that is not in there, `first`.
        first: the same of a model of which little is known in this minute.
    """

    def __init__(self, most: int, limit_ms: int) -> None:
        self._most = most
        self._limit_ns = limit_ms * 1_000_000 or _NEVER_NS
        self.first = 0 if most else self._limit_ns
        self.thresholds: dict[str, int] = {}
        self._kept: dict[str, list[int]] = {}
        self._until = 0.0

    def is_slow(self, model: str, took_ns: int) -> bool:
        """Whether a request that took so long is kept; if it is, the next one has to be slower."""
        if took_ns < self.thresholds.get(model, self.first):
            return False
        if self._most:
            kept = self._kept.setdefault(model, [])
            heapq.heappush(kept, took_ns)
            if len(kept) > self._most:
                heapq.heappop(kept)
            if len(kept) == self._most:
                self.thresholds[model] = min(kept[0] + 1, self._limit_ns)
        return True

    def look(self, now: float) -> None:
        """Begins the next minute if it is time (monotonic seconds)."""
        if now >= self._until:
            self._until = now + WINDOW_S
            self.thresholds.clear()
            self._kept.clear()


class Allowance:
    """How many records may be made: so many a second, and a second's worth at once."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._left = per_second
        self._at = 0.0

    def take(self, now: float) -> bool:
        """Whether one more may be made now (monotonic seconds)."""
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
