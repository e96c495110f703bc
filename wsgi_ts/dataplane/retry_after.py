"""When a client that is refused may come again: the Retry-After of a full queue, predicted from what waits.

What waits and runs, times what a request costs one model worker, shared among the workers that there are. All of that
stands on the board; it is read only when a request is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.dataplane.routes import Target

#: How long a prediction is used before the board is read again: many are refused at the same time.
_FRESH_NS: Final = 100_000_000
#: What a request costs is taken over so long at least: the cost of one batch says little.
_WINDOW_NS: Final = 1_000_000_000
#: The longest that a client is asked to wait, in seconds; the answer to a queue of hours is another server.
LONGEST_S: Final = 600
_ANSWERS: Final = range(ModelWord.LATENCY_BUCKETS, ModelWord.LATENCY_BUCKETS + len(layout.TIME_BUCKETS_US) + 1)


@dataclass
class _Look:
    """What was known of a model version at a time; `cost_us` is of one request."""

    at_ns: int
    answered: int
    service_us: int
    cost_us: float
    read_ns: int = 0
    seconds: int = 0


class RetryAfter:
    """The predictions of one process; belongs to one thread, or to who holds a lock."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._looks: dict[int, _Look] = {}

    def seconds(self, target: Target, now_ns: int) -> int:
        """When there will be room, in whole seconds, 1 at least; 0 where no worker is there and nothing waits for one.

        `now_ns` is monotonic.
        """
        look = self._looks.get(target.model)
        if look is None:
            look = self._looks[target.model] = _Look(now_ns, 0, 0, 0.0)
        if not look.read_ns or now_ns - look.read_ns >= _FRESH_NS:
            look.seconds = self._predict(look, target, now_ns)
            look.read_ns = now_ns
        return look.seconds

    def _predict(self, look: _Look, target: Target, now_ns: int) -> int:
        words = self._board.words
        ready = outstanding = answered = service_us = 0
        for batcher in target.batchers:
            row = self._board.model_row(batcher, target.model)
            ready += words[row + ModelWord.READY_WORKERS]
            outstanding += words[row + ModelWord.OUTSTANDING]
            answered += sum([words[row + word] for word in _ANSWERS])
            service_us += words[row + ModelWord.SERVICE_US]
        if answered < look.answered:  # the number belongs to another model by now
            look.answered = look.service_us = 0
            look.cost_us = 0.0
        if answered > look.answered and (not look.cost_us or now_ns - look.at_ns >= _WINDOW_NS):
            look.cost_us = (service_us - look.service_us) / (answered - look.answered)
            look.at_ns, look.answered, look.service_us = now_ns, answered, service_us
        if not ready and not outstanding:
            return 0
        wait_s = outstanding * look.cost_us / max(1, ready) / 1e6
        return min(LONGEST_S, max(1, math.ceil(wait_s)))
