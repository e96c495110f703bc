"""Times of HTTP requests by method, route and status, as a web worker counts them on the board."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from wsgi_ts.batcher.shm.layout import HTTP_BUCKETS_US, HTTP_SERIES, HTTP_WORDS, HttpWord
from wsgi_ts.http.route_names import METHODS, series_key

_METHODS: Final = {name: place for place, name in enumerate(METHODS)}
#: The series of a row that takes what no other one has room for.
_LAST: Final = HTTP_SERIES - 1


class HttpTimes:
    """One row of the board, whose owner this process is.

    Args:
        row: the row's first word. Another web worker may have had it before: its series go on.
    """

    def __init__(self, words: memoryview, row: int) -> None:
        self._words = words
        self._row = row
        #: Of each combination that has come, the first word of its series.
        self._series: dict[tuple[str, int, int], int] = {}

    def add(self, method: str, route: int, status: int, took_us: int) -> None:
        """Counts an answer.

        `method` is empty where it could not be read, `route` a place in `route_names.ROUTES`; `took_us` is from the
        request's arrival to the answer.
        """
        combination = method, route, status
        series = self._series.get(combination)
        if series is None:
            series = self._series[combination] = self._series_of(method, route, status)
        words = self._words
        words[series + HttpWord.SUM_US] += took_us
        words[series + HttpWord.BUCKETS + bisect_left(HTTP_BUCKETS_US, took_us)] += 1

    def _series_of(self, method: str, route: int, status: int) -> int:
        """The first word of the series of a combination, which gets one if it has none; the last one is everybody's."""
        key = series_key(_METHODS.get(method, 0), route, status)
        for number in range(HTTP_SERIES):
            series = self._row + number * HTTP_WORDS
            if number == _LAST:
                key = series_key(0, 0, 0)
            found = self._words[series + HttpWord.KEY]
            if found == 0:
                self._words[series + HttpWord.KEY] = key
            if found in (0, key):
                return series
        raise AssertionError("the last series takes everything")
