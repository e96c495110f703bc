"""The load generators of a tuning: orders go to their processes, tallies come back as one measurement."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType

import psutil

from wsgi_ts.process import PARENT_PID_VARIABLE
from wsgi_ts.tune.load import MOST_CONNECTIONS, Order, Tally
from wsgi_ts.tune.objective import percentile

#: Requests a second that one process sends and times without being late itself.
RATE_OF_ONE = 2500.0
#: A generator that uses more of a core, or a machine whose cores are used more, says little about the model.
BUSY = 0.9
#: Requests that are sent later than this part of the latency that is measured falsify it.
_LATE_PART = 0.2
_LATE_LEAST_S = 0.001
#: A generator's answer is waited for so much longer than the order says, in seconds.
_MARGIN_S = 60.0


class LoadError(Exception):
    """A load could not be generated; the message says why."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and the bytes of each, head and body."""

    requests: Sequence[bytes]
    host: str = ""
    port: int = 0
    unix_path: str = ""
    tls: bool = False


@dataclass(frozen=True)
class Measurement:
    """What a load came to.

    Attributes:
        latencies_s: of what was answered with 200, sorted, in seconds.
        statuses: how many answers of each status; 0: no answer.
        refusal: the first answer that was not 200.
        throughput: answers with 200 a second.
        warnings: what makes the figures doubtful.
    """

    latencies_s: list[float]
    sent: int
    statuses: dict[int, int]
    refusal: str
    throughput: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> int:
        """Requests that were not answered with 200."""
        return sum(count for status, count in self.statuses.items() if status != 200)


class _Process:
    """One generator."""

    def __init__(self) -> None:
        environ = {**os.environ, PARENT_PID_VARIABLE: str(os.getpid())}
        command = [sys.executable, "-m", "wsgi_ts.tune.load"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, start_new_session=True, text=True
        )

    def begin(self, order: Order) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(order)) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LoadError(f"The load generator has ended: {error.strerror}") from error

    def result(self) -> Tally:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LoadError("The load generator has ended; its last words are above.")
        fields = json.loads(line)
        fields["statuses"] = {int(status): count for status, count in fields["statuses"].items()}
        return Tally(**fields)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process.kill()
        self._process.wait()


class Generator:
    """Makes load with at most as many processes as cores; a context manager, at whose end they are gone."""

    def __init__(self, target: Target, cores: int) -> None:
        self._target = target
        self._most = max(1, cores)
        self._processes: list[_Process] = []
        self._seed = 0

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()

    def clients(self, count: int, seconds: float, warm_up_s: float = 0.2) -> Measurement:
        """So many clients ask, and again as soon as they are answered."""
        return self._measure([Order([], clients=min(count, MOST_CONNECTIONS))], seconds, warm_up_s)

    def at_random(self, rate: float, seconds: float, warm_up_s: float = 1.0) -> Measurement:
        """Requests come at random times, so many a second on average."""
        count = min(self._most, math.ceil(rate / RATE_OF_ONE))
        return self._measure([Order([], rate=rate / count)] * count, seconds, warm_up_s)

    def _measure(self, orders: list[Order], seconds: float, warm_up_s: float) -> Measurement:
        target = self._target
        while len(self._processes) < len(orders):
            self._processes.append(_Process())
        requests = [base64.b64encode(each).decode("ascii") for each in target.requests]
        where = {"host": target.host, "port": target.port, "unix_path": target.unix_path, "tls": target.tls}
        psutil.cpu_percent()
        for process, order in zip(self._processes, orders, strict=False):
            self._seed += 1
            timing = {"seconds": seconds, "warm_up_s": warm_up_s, "seed": self._seed}
            process.begin(Order(**{**asdict(order), **where, **timing, "requests": requests}))
        begun = time.monotonic()
        time.sleep(warm_up_s + seconds)
        machine = psutil.cpu_percent() / 100
        tallies = [process.result() for process in self._processes[: len(orders)]]
        if time.monotonic() - begun > seconds + warm_up_s + _MARGIN_S:
            raise LoadError("The server takes more than half a minute for an answer.")
        return _measurement(tallies, machine)


def _measurement(tallies: list[Tally], machine: float) -> Measurement:
    latencies = sorted(each / 1e6 for tally in tallies for each in tally.latencies_us)
    statuses: dict[int, int] = {}
    for tally in tallies:
        for status, count in tally.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    warnings = []
    busiest, latest_s = max(tally.cpu for tally in tallies), max(tally.late_us for tally in tallies) / 1e6
    if busiest > BUSY:
        warnings.append("the load generator is the bottleneck: it used up a core")
    elif latest_s > max(_LATE_LEAST_S, _LATE_PART * percentile(latencies, 99)) and latencies:
        warnings.append("the load generator was late with one request in a hundred, which falsifies the p99")
    if machine > BUSY:
        warnings.append(
            "the machine is the bottleneck: its cores were busy, with the load generator and all else that runs; a "
            "server on a machine of its own can do more"
        )
    return Measurement(
        latencies_s=latencies,
        sent=sum(tally.sent for tally in tallies),
        statuses=statuses,
        refusal=next((tally.refusal for tally in tallies if tally.refusal), ""),
        throughput=sum(len(tally.latencies_us) / tally.took_s for tally in tallies if tally.took_s),
        warnings=tuple(warnings),
    )
