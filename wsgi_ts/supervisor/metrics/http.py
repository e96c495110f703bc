"""What web workers count of HTTP requests on the board, read for the metrics: OpenTelemetry's histogram."""

from __future__ import annotations

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import HttpWord
from wsgi_ts.http.route_names import series_labels
from wsgi_ts.metrics.exposition import Family, Histogram
from wsgi_ts.metrics.specification import HISTOGRAM

#: The name and the labels that OpenTelemetry's conventions have in Prometheus.
NAME = "http_server_request_duration_seconds"
_LABELS = ("http_request_method", "http_route", "http_response_status_code")
_SECONDS = tuple(bound / 1e6 for bound in layout.HTTP_BUCKETS_US)


def http_family(board: Board) -> Family:
    """The histogram, with what all web workers have counted on the board."""
    family = Family(NAME, HISTOGRAM, "Time from the arrival of an HTTP request to its answer, in seconds", _LABELS)
    found: dict[int, list[int]] = {}
    for row in (*map(board.http_row, range(layout.MAX_WEB_ROWS)), board.control_http_row):
        _add_row(board, row, found)
    for key, words in sorted(found.items()):
        histogram = Histogram(_SECONDS, words[HttpWord.BUCKETS :], words[HttpWord.SUM_US] / 1e6)
        family.samples[series_labels(key)] = histogram
    return family


def _add_row(board: Board, row: int, found: dict[int, list[int]]) -> None:
    """Adds the series of one web worker to those of the others, by their keys."""
    for number in range(layout.HTTP_SERIES):
        start = row + number * layout.HTTP_WORDS
        key = board.words[start + HttpWord.KEY]
        if key == 0:
            break
        counted = board.words[start : start + layout.HTTP_WORDS].tolist()
        known = found.get(key)
        found[key] = counted if known is None else [sum(pair) for pair in zip(known, counted, strict=True)]
