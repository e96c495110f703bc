"""Times of HTTP requests on the board."""

from __future__ import annotations

from wsgi_ts.batcher.shm import layout
from wsgi_ts.batcher.shm.layout import HttpWord
from wsgi_ts.http.route_names import series_labels
from wsgi_ts.web.http_times import HttpTimes

ROW_WORDS = layout.HTTP_SERIES * layout.HTTP_WORDS


def read(words: memoryview, row: int) -> dict[tuple[str, str, str], list[int]]:
    """The series of a row by their labels."""
    found = {}
    for number in range(layout.HTTP_SERIES):
        series = words[row + number * layout.HTTP_WORDS : row + (number + 1) * layout.HTTP_WORDS].tolist()
        if series[HttpWord.KEY]:
            found[series_labels(series[HttpWord.KEY])] = series
    return found


def test_times_fall_into_buckets_by_method_route_and_status() -> None:
    words = memoryview(bytearray(2 * ROW_WORDS * layout.WORD)).cast("Q")
    times = HttpTimes(words, ROW_WORDS)
    for took_us in (500, 501, 20_000_000):
        times.add("POST", 1, 200, took_us)
    times.add("POST", 1, 503, 7)
    times.add("BREW", 1, 200, 7)
    found = read(words, ROW_WORDS)
    assert read(words, 0) == {}
    assert found.keys() == {(each, "/predictions/{model_name}", status) for each, status in (
        ("POST", "200"), ("POST", "503"), ("_OTHER", "200"),
    )}  # fmt: skip
    series = found["POST", "/predictions/{model_name}", "200"]
    assert series[HttpWord.SUM_US] == 20_001_001
    buckets = series[HttpWord.BUCKETS :]
    assert (buckets[0], buckets[1], buckets[-1], sum(buckets)) == (1, 1, 1, 3)


def test_what_has_no_room_is_counted_together_and_a_later_owner_goes_on() -> None:
    words = memoryview(bytearray(ROW_WORDS * layout.WORD)).cast("Q")
    for times in (HttpTimes(words, 0), HttpTimes(words, 0)):
        for status in range(200, 200 + layout.HTTP_SERIES + 5):
            times.add("GET", 1, status, 100)
    found = read(words, 0)
    assert len(found) == layout.HTTP_SERIES
    counts = {labels: sum(series[HttpWord.BUCKETS :]) for labels, series in found.items()}
    assert counts.pop(("_OTHER", "_OTHER", "_OTHER")) == 2 * 6
    assert set(counts.values()) == {2}
