"""The access log: TorchServe's line per request, written once per loop turn with one append."""

from __future__ import annotations

from wsgi_ts.logs.setup import LineLog


class AccessLog:
    """Lines gathered in memory; `flush` writes them."""

    def __init__(self, log: LineLog) -> None:
        self._log = log
        self._is_on = log.is_on()
        self._lines: list[str] = []

    def add(self, peer: str, line: str, status: int, took_ms: int) -> None:
        """Notes one answered request.

        Args:
            peer: "/address:port".
            line: method, target and protocol, fit for a log (`Head.line`).
            status: HTTP status.
            took_ms: milliseconds from the request's first byte to its answer.
        """
        if self._is_on:
            self._lines.append(f'{peer} "{line}" {status} {took_ms}')

    def add_line(self, line: str) -> None:
        """Notes one answered request, as a line that is complete and fit for a log."""
        if self._is_on:
            self._lines.append(line)

    def flush(self) -> None:
        """Writes what was noted since the last call."""
        if self._lines:
            self._log.write(self._lines)
            self._lines.clear()
