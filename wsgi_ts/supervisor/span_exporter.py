"""`python -m wsgi_ts.supervisor.span_exporter`: the process that turns records of requests into OpenTelemetry's spans.

It is there only where a collector is configured. Making spans takes time, and sending them more; no process that
serves requests does either. A collector that does not answer costs spans, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Sequence

from wsgi_ts.instance.instance import begin_process
from wsgi_ts.json_lines import decode
from wsgi_ts.process import set_process_title
from wsgi_ts.run_files import RunFiles
from wsgi_ts.supervisor.spans import Spans
from wsgi_ts.tracing.otlp import SenderOptions, SpanSender
from wsgi_ts.tracing.post import Inlet

log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
#: After it is told to stop, it goes on until so long nothing has come.
_QUIET_S = 0.5
#: It looks so often, in seconds, and takes all that has come: to be woken for each line would cost more than the line.
#: What comes meanwhile has room in the sockets; where there were more lines than that, it goes on at once.
_GATHER_S = 0.25
_MANY_LINES = 100
_GC_THRESHOLD = 50_000
#: How long the last spans get to leave, in seconds.
_FLUSH_S = 2.0


class SpanExporter:
    """Takes records until it is told to stop, and then what still comes of the requests that end.

    Args:
        ready_fd: gets a byte when it listens, and then one each second; -1 for none.

    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(self, files: RunFiles, spans: Spans, ready_fd: int) -> None:
        self._spans = spans
        self._ready_fd = ready_fd
        self._selector = selectors.DefaultSelector()
        self._inlet = Inlet(files.spans_socket, self._selector, self._take)
        self._stop_by = 0.0
        self._came_at = 0.0
        self._lines = 0

    def stop(self, within_s: float) -> None:
        """Ends once nothing comes any more, at the latest after so many seconds."""
        self._came_at = time.monotonic()
        self._stop_by = self._came_at + within_s

    def run(self) -> None:
        """Takes records."""
        beat_at = 0.0
        while not self._is_over():
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + _HEARTBEAT_S
                if self._ready_fd >= 0:
                    os.write(self._ready_fd, b"+")
            if self._spans.send_at and now >= self._spans.send_at:
                self._spans.flush()
            until = min(beat_at, self._spans.send_at or beat_at)
            for key, _ in self._selector.select(_QUIET_S if self._stop_by else max(0.0, until - now)):
                key.data()
            if not self._stop_by and self._lines < _MANY_LINES:
                time.sleep(_GATHER_S)
            self._lines = 0
        self._inlet.close()
        self._spans.flush(is_last=True)

    def _is_over(self) -> bool:
        now = time.monotonic()
        return bool(self._stop_by) and (now >= self._stop_by or now - self._came_at >= _QUIET_S)

    def _take(self, line: bytes) -> None:
        self._came_at = time.monotonic()
        self._lines += 1
        try:
            kind, fields = decode(line)
            self._spans.take(kind, fields)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("A line is no record of a trace: %s", error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports until it is told to stop; returns the exit code."""
    options, instance = begin_process(argparse.ArgumentParser(prog="span exporter", description=__doc__), arguments)
    set_process_title("wsgi-ts: span exporter")
    config = instance.config
    options_of_sender = SenderOptions.of(config.otlp_endpoint)
    sender = SpanSender(config.otlp_endpoint, options_of_sender)
    spans = Spans(sender, instance.prefix, options_of_sender.batch, options_of_sender.every_s)
    try:
        exporter = SpanExporter(RunFiles(options.run_dir), spans, options.ready_fd)
    except OSError as error:
        print(f"{RunFiles(options.run_dir).spans_socket}: {error}", file=sys.stderr, flush=True)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: exporter.stop(config.graceful_timeout))
    signal.signal(signal.SIGQUIT, lambda *_: exporter.stop(0.0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: instance.log_files.reopen())
    # Records make no cycles, but hundreds of objects each; what is there now stays.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    exporter.run()
    sender.close(_FLUSH_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
