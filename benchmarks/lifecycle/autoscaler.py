"""How many pods a HorizontalPodAutoscaler wants: Kubernetes' rule, without clock or cluster."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

#: A ratio of value to target this near to 1 changes nothing.
TOLERANCE = 0.1


@dataclass
class Autoscaler:
    """One autoscaler with metrics of pods.

    Attributes:
        targets: of each metric the average over the pods that is wanted.
        least, most: numbers of pods.
        window_s: the stabilisation window of scaling down, in seconds: what was wanted within it is not undercut.
    """

    targets: Mapping[str, float]
    least: int
    most: int
    window_s: float
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, now: float, current: int, values: Mapping[str, list[float]]) -> int:
        """Returns how many pods there should be.

        Args:
            now: any clock, in seconds.
            current: how many there are.
            values: of each metric the pods' values; a metric without any says nothing.
        """
        wanted = [
            self._by(sum(found) / current / self.targets[name], current) for name, found in values.items() if found
        ]
        proposal = min(max(wanted, default=current), self.most)
        self._wanted.append((now, max(proposal, self.least)))
        while self._wanted[0][0] < now - self.window_s:
            self._wanted.popleft()
        highest = max(count for _, count in self._wanted)
        # Up at once, down to what was the highest within the window.
        return self._wanted[-1][1] if self._wanted[-1][1] > current else min(current, highest)

    @staticmethod
    def _by(ratio: float, current: int) -> int:
        return current if abs(ratio - 1.0) <= TOLERANCE else math.ceil(current * ratio)
