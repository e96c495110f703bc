"""One request as a line of JSON, by OpenTelemetry's names: what the access log has with `log_format=json`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from wsgi_ts.json_lines import ascii_line


class _Clock:
    """Writes times as RFC 3339 has them; the part that is the same for a whole second is made once."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, now: float) -> str:
        """Returns a time, in seconds since the epoch, to the millisecond."""
        second = int(now)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._text}.{int((now - second) * 1000):03d}Z"


_clock = _Clock()


def request_line(took_ns: int, fields: Mapping[str, Any]) -> str:
    """Returns the line.

    It took `took_ns` from the request's first byte to its answer; of `fields` those are left out that are None.
    """
    record: dict[str, Any] = {"timestamp": _clock.text(time.time()), "duration_ms": round(took_ns / 1e6, 3)}
    for name, value in fields.items():
        if value is not None:
            record[name] = value
    return ascii_line(record)
