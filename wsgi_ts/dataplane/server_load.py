"""How busy this server is, for what tells proxies of it in its answers (ORCA: Envoy, gRPC, gateways)."""

from __future__ import annotations

from typing import Final, NamedTuple

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import KV_CACHE_FULL, ModelWord
from wsgi_ts.dataplane.routes import RoutingTable

#: How long a value counts before the board is read again.
_FRESH_NS: Final = 100_000_000


class Load(NamedTuple):
    """The load at one time.

    Attributes:
        utilization: requests waiting or running for each model worker that takes requests; above 1 requests wait.
        queued: requests that wait.
        running: requests that model workers have.
        kv_cache: how full the KV caches of the model workers are that tell it, 0 to 1; None where none does.
    """

    utilization: float
    queued: int
    running: int
    kv_cache: float | None = None

    def named_metrics(self) -> dict[str, float]:
        """What there is no field for in a report, by the names that proxies know from other servers."""
        named: dict[str, float] = {"queue_depth": self.queued, "running_requests": self.running}
        if self.kv_cache is not None:
            named["kv_cache_usage_perc"] = self.kv_cache  # as vLLM calls it
        return named


class ServerLoad:
    """Reads the load from the board, now and then."""

    def __init__(self, board: Board, routes: RoutingTable) -> None:
        self._board = board
        self._routes = routes
        self._last: Load | None = None
        self._read_ns = 0

    def now(self, now_ns: int) -> Load:
        """Returns the load; the same object as the last time where that was a moment ago.

        `now_ns` is monotonic.
        """
        load = self._last
        if load is None or now_ns - self._read_ns >= _FRESH_NS:
            load = self._last = self._read()
            self._read_ns = now_ns
        return load

    def _read(self) -> Load:
        words = self._board.words
        ready = queued = outstanding = cached = caches = 0
        for model, batchers in self._routes.rows():
            for batcher in batchers:
                row = self._board.model_row(batcher, model)
                ready += words[row + ModelWord.READY_WORKERS]
                queued += words[row + ModelWord.QUEUED]
                outstanding += words[row + ModelWord.OUTSTANDING]
                cached += words[row + ModelWord.KV_CACHE]
                caches += words[row + ModelWord.KV_CACHE_WORKERS]
        kv_cache = cached / (caches * KV_CACHE_FULL) if caches else None
        return Load(outstanding / ready if ready else 1.0, queued, max(0, outstanding - queued), kv_cache)
