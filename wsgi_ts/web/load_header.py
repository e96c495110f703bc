"""The load of this server in a header of each answer, for proxies that choose by it (ORCA: Envoy, gRPC, gateways).

`endpoint-load-metrics: JSON {"application_utilization":0.5,"named_metrics":{…}}`. The utilization is requests waiting
or running for each model worker that takes requests; above 1 requests wait.
"""

from __future__ import annotations

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import ModelWord
from wsgi_ts.dataplane.routes import RoutingTable

#: How long a value is sent before the board is read again.
_FRESH_NS = 100_000_000


class LoadHeader:
    """The header line as it is now.

    Args:
        board: where batchers count.
        routes: which models there are, and on which batchers.
    """

    def __init__(self, board: Board, routes: RoutingTable) -> None:
        self._board = board
        self._routes = routes
        self._line = b""
        self._read_ns = 0

    def add_to(self, head: bytes, now_ns: int) -> bytes:
        """Returns the head of an answer with the header.

        Args:
            head: status line and headers, with the empty line.
            now_ns: monotonic time.
        """
        if now_ns - self._read_ns >= _FRESH_NS or not self._line:
            self._line = self._read()
            self._read_ns = now_ns
        return head[:-2] + self._line

    def _read(self) -> bytes:
        words = self._board.words
        ready = queued = outstanding = 0
        for model, batchers in self._routes.rows():
            for batcher in batchers:
                row = self._board.model_row(batcher, model)
                ready += words[row + ModelWord.READY_WORKERS]
                queued += words[row + ModelWord.QUEUED]
                outstanding += words[row + ModelWord.OUTSTANDING]
        utilization = outstanding / ready if ready else 1.0
        named = f'{{"queue_depth":{queued},"running_requests":{max(0, outstanding - queued)}}}'
        value = f'{{"application_utilization":{utilization:.4g},"named_metrics":{named}}}'
        return f"endpoint-load-metrics: JSON {value}\r\n\r\n".encode()
