"""What a web worker tells of its answers: a line in the access log for each, and counters on the board."""

from __future__ import annotations

import time
from typing import Final

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import WebWord
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.web.connection import Connection

#: Stands for the request line of a request that could not be read.
NO_LINE: Final = "- - -"
_COUNTERS: Final = (WebWord.RESPONSES_2XX, WebWord.RESPONSES_4XX, WebWord.RESPONSES_5XX)


class Report:
    """Gathers what was answered in a turn of the loop; `flush` lets it leave the process.

    Args:
        log: the access log's file.
        board: the instance's board.
        web_row: this web worker's row of counters on it.
    """

    def __init__(self, log: LineLog, board: Board, web_row: int) -> None:
        self.board = board
        self._access = AccessLog(log)
        self._web_row = web_row
        self._counts = [0, 0, 0]

    def note(self, connection: Connection, status: int) -> None:
        """Notes that the request under way is answered with this HTTP status."""
        took_ms = (time.monotonic_ns() - connection.arrival_ns) // 1_000_000
        head = connection.head
        self._access.add(connection.peer, head.line if head is not None else NO_LINE, status, took_ms)
        self._counts[0 if 200 <= status < 300 else 1 if 400 <= status < 500 else 2] += 1

    def flush(self) -> None:
        """Writes the lines and adds to the counters."""
        self._access.flush()
        for place, word in enumerate(_COUNTERS):
            count = self._counts[place]
            if count:
                self.board.words[self._web_row + word] += count
                self._counts[place] = 0
