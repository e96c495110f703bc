"""What a model worker prints: read without end, cut into lines, kept in bounds, written to the model's logs.

A model worker runs user code, which prints whatever it likes, as fast as it likes: a line is cut at 8 KiB, a
worker gets 1 MB a second, the rest is counted and dropped. Reading never stops, so printing never blocks.
"""

from __future__ import annotations

import logging
import os
from collections import deque

from wsgi_ts.logs.setup import LogFiles
from wsgi_ts.logs.text import escape_controls
from wsgi_ts.metrics.reported import ModelMetrics, parse_line

MAX_LINE_BYTES = 8192
BYTES_PER_SECOND = 1_000_000
#: How many of a worker's last lines are kept for describe-model.
LAST_LINES = 50
_READ_BYTES = 65536
_METRICS_MARK = "[METRICS]"


class LineSplitter:
    """Cuts a stream of bytes into lines of text of at most MAX_LINE_BYTES; what is longer loses its end."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[str]:
        """Takes the next bytes and returns the lines that they complete."""
        *pieces, rest = data.split(b"\n")
        lines = []
        for piece in pieces:
            lines += self._end_line(piece)
        if not self._skipping:
            self._rest += rest
            if len(self._rest) > MAX_LINE_BYTES:
                lines.append(_text(self._rest))
                self._rest, self._skipping = b"", True
        return lines

    def drop(self, data: bytes) -> None:
        """Passes over bytes, and the line that they begin in or end in."""
        self._rest, self._skipping = b"", not data.endswith(b"\n")

    def finish(self) -> list[str]:
        """The last line, where it has no line end."""
        return self._end_line(b"") if self._rest else []

    def _end_line(self, piece: bytes) -> list[str]:
        if self._skipping:
            self._skipping = False
            return []
        line, self._rest = self._rest + piece, b""
        return [_text(line)]


class RateLimit:
    """A bucket of bytes that fills with time: how much of a worker's output is kept."""

    def __init__(self, now: float, bytes_per_second: int = BYTES_PER_SECOND) -> None:
        self._rate = bytes_per_second
        self._level = float(bytes_per_second)
        self._filled_at = now

    def allows(self, size_bytes: int, now: float) -> bool:
        """Whether so many bytes may pass at `now` (monotonic seconds); takes them out if so."""
        self._level = min(float(self._rate), self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if size_bytes > self._level:
            return False
        self._level -= size_bytes
        return True


class WorkerOutput:
    """The stdout and stderr of one life of a model worker.

    Args:
        thread_name: `W-9000-probe_1.0`, the start of the name under which its lines are logged.
    """

    def __init__(self, thread_name: str, logs: LogFiles, metrics: ModelMetrics, now: float) -> None:
        self._thread_name = thread_name
        self._logs = logs
        self._metrics = metrics
        self._limit = RateLimit(now)
        self._splitters = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._dropped_lines = 0
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def read(self, fd: int, stream: str, now: float) -> bool:
        """Reads what is there (one piece) from a non-blocking pipe, of `stdout` or `stderr`; False at its end."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return True
        if not self._limit.allows(len(data), now):
            self._splitters[stream].drop(data)
            self._dropped_lines += data.count(b"\n") or 1
            return True
        self._tell_dropped(stream)
        self._write(stream, self._splitters[stream].feed(data))
        return bool(data)

    def finish(self) -> None:
        """Writes what has no line end yet, and how many lines are missing."""
        for stream, splitter in self._splitters.items():
            self._write(stream, splitter.finish())
        self._tell_dropped("stderr")

    def _tell_dropped(self, stream: str) -> None:
        if self._dropped_lines:
            text = f"[{self._dropped_lines} lines dropped: more than {BYTES_PER_SECOND} bytes per second]"
            self._dropped_lines = 0
            self._write(stream, [text])

    def _write(self, stream: str, lines: list[str]) -> None:
        texts, metrics, broken = [], [], []
        for line in lines:
            if line.startswith(_METRICS_MARK):
                reported = parse_line(line[len(_METRICS_MARK) :])
                message = self._metrics.record(reported) if reported is not None else None
                if reported is None:
                    broken.append(f'Failed to parse metrics line: "{line}".')
                elif message is not None:
                    metrics.append(message)
            else:
                self.last_lines.append(line)
                texts.append(line)
        thread = f"{self._thread_name}-{stream}"
        self._logs.model.write(texts, logging.INFO if stream == "stdout" else logging.WARNING, thread)
        self._logs.model_metrics.write(metrics, logging.INFO, thread)
        self._logs.life_cycle.write(broken, logging.ERROR, thread)


def _text(line: bytes) -> str:
    cut = "" if len(line) <= MAX_LINE_BYTES else " [cut]"
    text = line[:MAX_LINE_BYTES].removesuffix(b"\r").decode("utf-8", "backslashreplace")
    return escape_controls(text) + cut
