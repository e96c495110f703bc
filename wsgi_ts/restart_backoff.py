"""How long to wait before a process that has died is started again."""

from __future__ import annotations

from collections import deque


class RestartBackoff:
    """The waits of one process, through all its lives; never gives up.

    A life that came up and then died was of use, and so will the next be: it follows within a second, however often
    that happens. Lives that end one after the other before they come up are a loop, which slows down from the fifth.
    """

    _DELAYS_S = (0.0, 0.1, 0.3, 1.0)
    _LOOP_DELAYS_S = (5.0, 10.0, 20.0, 30.0)
    _WINDOW_S = 60.0

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._in_a_row = 0

    def on_death(self, now: float, *, came_up: bool = False) -> float:
        """Counts a death at the monotonic time `now`, of a life that came up or not; returns the wait in seconds."""
        while self._deaths and now - self._deaths[0] > self._WINDOW_S:
            self._deaths.popleft()
        if came_up or not self._deaths:
            self._in_a_row = 0
        self._deaths.append(now)
        self._in_a_row += not came_up
        if self.is_looping:
            times = self._in_a_row - len(self._DELAYS_S)
            return self._LOOP_DELAYS_S[min(times, len(self._LOOP_DELAYS_S)) - 1]
        return self._DELAYS_S[min(len(self._deaths), len(self._DELAYS_S)) - 1]

    @property
    def is_looping(self) -> bool:
        """Whether it has died so often before it came up that something is wrong with it."""
        return self._in_a_row > len(self._DELAYS_S)
