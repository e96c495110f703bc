"""The access log: TorchServe's line per request, written once per loop turn with one append."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "access_log.log"


class AccessLog:
    """Lines gathered in memory; `flush` appends them to `access_log.log` (O_APPEND: processes do not mix lines)."""

    def __init__(self, log_dir: Path) -> None:
        self._path = log_dir / FILE_NAME
        self._lines: list[str] = []
        self._stamp = ""
        self._stamp_second = -1
        self._fd = -1
        self.reopen()

    def reopen(self) -> None:
        """Opens the file again, after it was rotated away; without a writable directory no log is kept."""
        if self._fd >= 0:
            os.close(self._fd)
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._fd = -1
            log.warning("No access log: %s cannot be opened (%s).", self._path, error.strerror)

    def add(self, peer: str, line: str, status: int, took_ms: int) -> None:
        """Notes one answered request.

        Args:
            peer: "/address:port".
            line: method, target and protocol.
            status: HTTP status.
            took_ms: milliseconds from the request's first byte to its answer.
        """
        self._lines.append(f'{peer} "{line}" {status} {took_ms}\n')

    def flush(self) -> None:
        """Writes what was noted since the last call."""
        lines = self._lines
        if not lines:
            return
        if self._fd >= 0:
            now = time.time()
            second = int(now)
            if second != self._stamp_second:
                self._stamp_second = second
                self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))
            stamp = f"{self._stamp},{int(now % 1 * 1000):03d} - "
            try:
                os.write(self._fd, (stamp + stamp.join(lines)).encode("latin-1", "replace"))
            except OSError as error:
                log.warning("The access log cannot be written (%s); %d lines are lost.", error.strerror, len(lines))
        lines.clear()
