"""The handler of the measurement of streams: a chunk for each stream, at a steady pace, until its client leaves."""

import time
from typing import Any

STEP_S = 0.02
CHUNK = "a chunk of a stream of sixty-four bytes, the line's end included\n"


class TicksHandler:
    """With `continuousBatching: true` each call is one step."""

    def initialize(self, context: Any) -> None:
        """The steps begin at once."""
        self.next_step = time.monotonic()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Waits for the time of the next step, so that the chunks of a second are the same however many streams."""
        self.next_step = max(self.next_step + STEP_S, time.monotonic() - STEP_S)
        time.sleep(max(0.0, self.next_step - time.monotonic()))
        context.stopping_criteria = [lambda _: False] * len(data)
        return [CHUNK] * len(data)
