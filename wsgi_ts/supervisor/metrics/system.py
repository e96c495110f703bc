"""The system metrics: CPU, memory, disk and GPUs, measured every `metric_time_interval`.

Measured on a thread of the supervisor, or by the user's `system_metrics_cmd`: a Python program that reads the process
ids of the model workers on stdin and prints a metric a line, an empty line, and a line `pid:bytes` for each process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import wsgi_ts
from wsgi_ts.gpu.devices import gpu_loads
from wsgi_ts.logs.text import escape_controls
from wsgi_ts.metrics.host import MEASURES
from wsgi_ts.metrics.reported import parse_line
from wsgi_ts.process import inherited_environ
from wsgi_ts.supervisor.metrics.board import HOST_LEVEL, Values
from wsgi_ts.ts_path import shim_path

log = logging.getLogger(__name__)

#: How long `system_metrics_cmd` may take at least, in seconds; more where the interval is longer.
_COMMAND_LIMIT_S = 30.0
_MAX_LOGGED = 4000


@dataclass(slots=True, kw_only=True)
class SystemMetrics:
    """Measures again and again until it is stopped.

    Attributes:
        interval_s: the time from one measurement to the next, in seconds.
        hostname: the value of the host dimension.
        command: `system_metrics_cmd`; "" measures by itself.
        home: the directory in which the command runs; None for where the package `ts` lies.
        worker_pids: the process ids of the model workers, for the command.
        publish: gets the values of each measurement by the metric's name.
    """

    interval_s: float
    gpus: int
    hostname: str
    command: str
    home: Path | None
    worker_pids: Callable[[], list[int]]
    publish: Callable[[dict[str, Values]], None]
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def start(self) -> None:
        """Begins; what needs no other program is measured before this returns, so that whoever asks first finds it."""
        if not self.command:
            self._publish_from(self._measure_host)
        is_complete = not self.command and self.gpus == 0
        wait_s = self.interval_s if is_complete else 0.0
        threading.Thread(target=self._run, args=(wait_s,), name="system metrics", daemon=True).start()

    def stop(self) -> None:
        """Ends it, and the command if it runs."""
        self._stopped.set()
        with self._lock:
            if self._process is not None:
                _kill(self._process)
                self._process.wait()

    def _run(self, wait_s: float) -> None:
        while not self._stopped.wait(wait_s):
            wait_s = self.interval_s
            self._publish_from(self._ask_command if self.command else self._measure)

    def _publish_from(self, measure: Callable[[], dict[str, Values]]) -> None:
        try:
            self.publish(measure())
        except Exception:
            log.exception("The system metrics cannot be measured; tried again in %g s", self.interval_s)

    def _measure_host(self) -> dict[str, Values]:
        host = (HOST_LEVEL, self.hostname)
        return {name: {host: measure()} for name, measure in MEASURES.items()}

    def _measure(self) -> dict[str, Values]:
        values = self._measure_host()
        for number, load in enumerate(gpu_loads(self.gpus)):
            for name, value in load.items():
                values.setdefault(name, {})[HOST_LEVEL, str(number), self.hostname] = value
        return values

    def _ask_command(self) -> dict[str, Values]:
        output = self._run_command(",".join(map(str, self.worker_pids())) + "\n")
        values: dict[str, Values] = {}
        for line in map(escape_controls, map(str.strip, output.splitlines())):
            if not line:
                # What follows is the memory of the workers, which describe-model reads for itself.
                break
            reported = parse_line(line)
            if reported is None:
                log.error('Failed to parse metrics line of system_metrics_cmd: "%s".', line[:_MAX_LOGGED])
                continue
            dimensions = (*reported.dimensions.values(), reported.host)
            values.setdefault(reported.name, {})[dimensions] = reported.value
        return values

    def _run_command(self, pids: str) -> str:
        """What the command prints; "" where it cannot be run, and then the log says why."""
        home = self.home or Path(shim_path())
        limit_s = max(_COMMAND_LIMIT_S, self.interval_s)
        command = [sys.executable, *shlex.split(self.command)]
        places = (shim_path(), str(Path(wsgi_ts.__file__).parent.parent), os.environ.get("PYTHONPATH"))
        try:
            with self._lock:
                if self._stopped.is_set():
                    return ""
                self._process = process = subprocess.Popen(
                    command,
                    cwd=home,
                    env={**inherited_environ(), "PYTHONPATH": os.pathsep.join(filter(None, places))},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="backslashreplace",
                    start_new_session=True,
                )
        except OSError as error:
            log.error("system_metrics_cmd %s cannot be run in %s: %s", self.command, home, error)
            return ""
        try:
            output, errors = process.communicate(pids, limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.communicate()
            log.error("system_metrics_cmd %s took more than %g s and was killed", self.command, limit_s)
            return ""
        finally:
            with self._lock:
                self._process = None
        if self._stopped.is_set():
            return ""
        for line in errors[:_MAX_LOGGED].splitlines():
            log.error("system_metrics_cmd: %s", escape_controls(line))
        if process.returncode:
            log.error("system_metrics_cmd %s ended with exit code %d", self.command, process.returncode)
        return output


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a command with all that it has started and that would keep its output open."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
