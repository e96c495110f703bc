"""A report that also tells plugins of finished requests: of some of them, in lists, from a thread of its own."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.plugins.events import Events
from wsgi_ts.web.connection import Connection
from wsgi_ts.web.report import NO_LINE, Report

log = logging.getLogger("wsgi_ts.plugins")

EVENT = "request_finished"
#: The share of requests that listeners are told of, where they name none.
DEFAULT_SAMPLE = 0.01
_MOST_TOGETHER = 100


class SampledReport(Report):
    """Takes the place of `Report` where a plugin listens.

    Args:
        sample: the share of requests that they are told of.
    """

    def __init__(self, events: Events, sample: float, log: LineLog, board: Board, web_row: int, http_row: int) -> None:
        super().__init__(log, board, web_row, http_row)
        self._events = events
        self._sample = sample
        self._records: list[dict[str, Any]] = []

    def note(self, connection: Connection, status: int) -> None:
        """Notes that the request under way is answered with this HTTP status."""
        super().note(connection, status)
        if random.random() < self._sample and len(self._records) < _MOST_TOGETHER:
            head, target = connection.head, connection.target
            self._records.append(
                {
                    "request_id": connection.request_id,
                    "line": head.line if head is not None else NO_LINE,
                    "peer": connection.peer,
                    "status": status,
                    "took_ms": max(0, time.monotonic_ns() - connection.arrival_ns) / 1e6,
                    "model": target.model_name if target is not None else "",
                }
            )

    def flush(self) -> None:
        """Writes the lines, adds to the counters, and hands over what plugins are told."""
        super().flush()
        if self._records:
            records, self._records = self._records, []
            self._events.tell(EVENT, records=records)


def sampled(events: Events) -> float:
    """The share of requests that the listeners of this process want to hear of; 0 where none listens."""
    return max(map(_share_of, events.listeners_to(EVENT)), default=0.0)


def _share_of(listener: Any) -> float:
    try:
        return float(getattr(listener, "sample", DEFAULT_SAMPLE))
    except (TypeError, ValueError):
        log.warning("Plugin %s: sample is no number; %g it is", type(listener).__name__, DEFAULT_SAMPLE)
        return DEFAULT_SAMPLE
