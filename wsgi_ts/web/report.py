"""What a web worker tells of its answers: a line in the access log for each, and counters on the board."""

from __future__ import annotations

import time
from typing import Final

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import CLIENT_GONE, WebWord
from wsgi_ts.batcher.shm.segment import Segment
from wsgi_ts.dataplane.request_traces import RequestTraces
from wsgi_ts.errors import ServerError
from wsgi_ts.http.route_names import route_of
from wsgi_ts.logs.access import AccessLog
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.http_times import HttpTimes
from wsgi_ts.web.told import json_line, told_of

#: Stands for the request line of a request that could not be read.
NO_LINE: Final = "- - -"
_GONE: Final = ServerError(CLIENT_GONE, status=499)
_COUNTERS: Final = (WebWord.RESPONSES_2XX, WebWord.RESPONSES_4XX, WebWord.RESPONSES_5XX)


class Report:
    """Gathers what was answered in a turn of the loop; `flush` lets it leave the process.

    Attributes:
        traces: makes records of requests; None: there are none.
        segment: where requests lie; None where no predictions are served.
        is_json: the access log has JSON instead of TorchServe's lines.
    """

    def __init__(self, log: LineLog, board: Board, web_row: int, http_row: int) -> None:
        self.board = board
        self.traces: RequestTraces | None = None
        self.segment: Segment | None = None
        self.is_json = False
        self._access = AccessLog(log)
        self._web_row = web_row
        self._counts = [0, 0, 0]
        self._times = HttpTimes(board.words, http_row)

    def note(self, connection: Connection, status: int) -> None:
        """Notes that the request under way is answered with this HTTP status."""
        took_ns = time.monotonic_ns() - connection.arrival_ns
        head, target = connection.head, connection.target
        if self.is_json:
            self._access.add_line(json_line(self.segment, connection, status, took_ns))
        else:
            line = head.line if head is not None else NO_LINE
            self._access.add(connection.peer, line, status, took_ns // 1_000_000)
        if self.traces is not None and connection.phase != Phase.STREAM:
            self._trace(self.traces, connection, status, took_ns)
        if head is None:
            self._times.add("", 0, status, took_ns // 1000)
        else:
            route = target.route if target is not None else 0
            self._times.add(head.method, route or route_of(head.path), status, took_ns // 1000)
        self._counts[0 if 200 <= status < 300 else 1 if 400 <= status < 500 else 2] += 1

    def end_stream(self, connection: Connection) -> None:
        """Notes that a streamed answer, of which `note` was told at its begin, has come to its end."""
        if self.traces is not None:
            status = 200 if connection.fault is None else connection.fault.status
            self._trace(self.traces, connection, status, time.monotonic_ns() - connection.arrival_ns)

    def left(self, connection: Connection) -> None:
        """Notes that a client has gone before it had its answer."""
        if self.traces is not None:
            connection.fault = connection.fault or _GONE
            self._trace(self.traces, connection, _GONE.status, time.monotonic_ns() - connection.arrival_ns)

    def look(self, now_ns: int) -> None:
        """Does what is due from time to time; `now_ns` is monotonic."""
        if self.traces is not None:
            self.traces.look(now_ns / 1e9)

    @staticmethod
    def _trace(traces: RequestTraces, connection: Connection, status: int, took_ns: int) -> None:
        target = connection.target
        if target is None:
            return
        name = target.model_name if target.graph is None else target.graph.name
        if traces.is_worth_it(name, status, took_ns, connection.trace):
            traces.tell(told_of(traces, connection, target, status, took_ns))

    def flush(self) -> None:
        """Writes the lines and adds to the counters."""
        self._access.flush()
        for place, word in enumerate(_COUNTERS):
            count = self._counts[place]
            if count:
                self.board.words[self._web_row + word] += count
                self._counts[place] = 0

    def close(self) -> None:
        """Lets what was gathered leave, for the last time."""
        self.flush()
        if self.traces is not None:
            self.traces.close()
