"""What `make prove` measures of each server; every figure comes from a server that was started for it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.processes import marked

from reliability import census, open_loop
from reliability.campaign import BACK_S, Campaign, Findings, findings
from reliability.load import Load, Outcome, executions
from reliability.slow_clients import BYTE_S, slow_clients
from reliability.subjects import Subject, subject, wait_for_end

#: How many times its capacity a server is asked for.
OVERLOAD = 3
#: How long a request takes there, in milliseconds: little of it is the machine's time, so that capacity is the model's.
OVERLOAD_MS = 40
CLIENTS = 4
#: Requests that are under way when a server is asked to end, and how long each takes.
DRAINED = 4
DRAIN_MS = 500
#: Of a soak: looks, models that come and go before it, and the part of its time that passes before it.
LOOKS = 40
WARM_REGISTRATIONS = 3
WARM_UP = 0.1


@contextmanager
def running(name: str, *, ms: int = 1, batch_size: int = 4) -> Iterator[Subject]:
    """A server that has started; whatever is left of it is killed at the end."""
    with tempfile.TemporaryDirectory(prefix="wts-prove-") as folder:
        server = subject(name, Path(folder), ms=ms, batch_size=batch_size)
        try:
            server.start()
            yield server
        finally:
            server.remove()


def measure_kills(
    name: str, count: int, seed: int, progress: Callable[[int], None], back_limit_s: float = BACK_S
) -> Findings:
    """So many SIGKILLs under the load of four clients."""
    with running(name) as server:
        with Load(server, clients=CLIENTS, path=server.path, seed=seed % 1000, hang_s=back_limit_s) as load:
            _wait_for_load(load)
            campaign = Campaign(server, load, seed, back_limit_s)
            campaign.run(count, progress)
        return findings(campaign, executions(server.folder))


def _wait_for_load(load: Load) -> None:
    deadline = time.monotonic() + 30
    while load.count("ok") < 20 and time.monotonic() < deadline:
        time.sleep(0.05)


@dataclass(frozen=True)
class Ends:
    """What is left of a server: after SIGTERM, after SIGKILL of its main process, and after the next start.

    Attributes:
        stop_s: how long SIGTERM takes.
        after_term: processes and names that are still there.
        after_kill: processes that are still there two seconds later.
        after_start: names of the killed one that are still there when the next one has started.
    """

    stop_s: float
    after_term: list[str]
    after_kill: list[str]
    after_start: list[str]


def measure_ends(name: str) -> Ends:
    """Stops a server, and kills one."""
    with running(name) as server:
        names = server.take_census().names
        asked_at = time.monotonic()
        server.end(signal.SIGTERM)
        left = wait_for_end(server)
        stop_s = time.monotonic() - asked_at
        after_term = left + census.existing(names)
        server.discard()
        server.start()
        names = server.take_census().names
        server.end(signal.SIGKILL)
        after_kill = wait_for_end(server, 2.0)
        # Whoever starts it again ends what is in the way first: its port is taken.
        for process in marked(server.marker):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for_end(server)
        server.start()
        return Ends(stop_s, after_term, after_kill, census.existing(names))


@dataclass(frozen=True)
class Drain:
    """Of requests that were under way at SIGTERM: how many there were, and how many were answered well."""

    under_way: int
    answered: int


def measure_drain(name: str) -> Drain:
    """Asks a server to end while it works."""
    with running(name, ms=DRAIN_MS, batch_size=1) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=_ask, args=(server, statuses)) for _ in range(DRAINED)]
        for thread in threads:
            thread.start()
        time.sleep(DRAIN_MS / 2000)
        server.end(signal.SIGTERM)
        for thread in threads:
            thread.join()
        return Drain(DRAINED, statuses.count(200))


def _ask(server: Subject, statuses: list[int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=30)
    try:
        connection.request("POST", server.path, b"d" * 32, {"content-type": "application/octet-stream"})
        statuses.append(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        statuses.append(0)
    finally:
        connection.close()


@dataclass(frozen=True)
class Overload:
    """A server that is asked for more than it can do.

    Attributes:
        capacity: good answers a second where it is asked for no more than it can do at a time.
        goodput: the same at `OVERLOAD` times as many requests.
        good_s: 99th percentile of how long good answers take then.
        refused_s: 99th percentile of how long refusals take; None where there were none.
        retry_after: which part of the refusals has the header.
        retry_said_s: what it says, median; None without.
        wait_s: how long good answers took while the queue was full, median.
        unanswered: requests that never got an answer.
        wrong: answers that are not the request's own.
    """

    capacity: float
    goodput: float
    good_s: float
    refused_s: float | None
    retry_after: float
    retry_said_s: float | None
    wait_s: float
    unanswered: int
    wrong: int


def measure_overload(name: str, seconds: float) -> Overload:
    """Measures the capacity, then asks for three times as much."""
    with running(name, ms=OVERLOAD_MS, batch_size=1) as server:
        with Load(server, clients=8, path=server.path, hang_s=60) as load:
            _wait_for_load(load)
            began, before = time.monotonic(), load.count("ok")
            time.sleep(seconds)
            capacity = (load.count("ok") - before) / (time.monotonic() - began)
        run = open_loop.send(server.ports["inference"], server.path, OVERLOAD * capacity, 2 * seconds)
    good, refused = run.latencies(good=True), run.latencies(good=False)
    told = [each.retry_after for each in run.replies if each.status != 200 and each.retry_after >= 0]
    while_full = [each.ended_at - each.sent_at for each in run.replies if each.status == 200 and each.sent_at > seconds]
    return Overload(
        capacity,
        # The queue fills during the first half.
        run.goodput(seconds),
        _percentile(good, 0.99) or 0.0,
        _percentile(refused, 0.99),
        len(told) / len(refused) if refused else 0.0,
        statistics.median(told) if told else None,
        statistics.median(while_full) if while_full else 0.0,
        run.sent - len(run.replies),
        run.wrong,
    )


def _percentile(values: list[float], part: float) -> float | None:
    return values[min(len(values) - 1, int(len(values) * part))] if values else None


@dataclass(frozen=True)
class Slow:
    """Clients beside others that send a byte a second.

    Attributes:
        alone_s: 99th percentile of how long a good answer takes without them, before and after.
        beside_s: the same beside them.
        bad: requests beside them that were not answered well.
        requests: how many there were.
    """

    alone_s: float
    beside_s: float
    bad: int
    requests: int


def measure_slow(name: str, seconds: float) -> Slow:
    """Asks with four clients, first alone, then beside slow ones, then alone again."""
    with running(name) as server, Load(server, clients=CLIENTS, path=server.path, hang_s=60) as load:
        _wait_for_load(load)
        began = time.monotonic()
        time.sleep(seconds)
        with slow_clients(server.ports["inference"], server.path):
            time.sleep(BYTE_S)  # they have come by now
            slow_from = time.monotonic()
            time.sleep(2 * seconds)
            slow_until = time.monotonic()
        time.sleep(BYTE_S)
        again = time.monotonic()
        time.sleep(seconds)
    beside = [each for each in load.outcomes if slow_from <= each.sent_at <= slow_until]
    alone = [each for each in load.outcomes if began <= each.sent_at <= slow_from - BYTE_S or each.sent_at >= again]
    return Slow(
        _p99_of_good(alone),
        _p99_of_good(beside),
        sum(each.result != "ok" for each in beside),
        len(beside),
    )


def _p99_of_good(outcomes: Sequence[Outcome]) -> float:
    took = sorted(each.ended_at - each.sent_at for each in outcomes if each.result == "ok")
    return _percentile(took, 0.99) or 0.0


@dataclass(frozen=True)
class Soak:
    """What a server holds as time passes under load.

    Attributes:
        seconds: how long it was looked at.
        requests: how many it answered meanwhile.
        registered: how many models came and went meanwhile.
        slope: of its memory, in bytes an hour: the median of the slopes between all pairs of looks.
        slope_upper: 95 % upper bound of that.
        descriptors, threads, processes, names: how many more there are at the end.
        bad: requests that were not answered well.
    """

    seconds: float
    requests: int
    registered: int
    slope: float
    slope_upper: float
    descriptors: int
    threads: int
    processes: int
    names: int
    bad: int


def measure_soak(name: str, seconds: float, registrations: int, progress: Callable[[int], None]) -> Soak:
    """Looks at a server under load, with models that come and go where it has a management API."""
    with running(name) as server, Load(server, clients=CLIENTS, path=server.path, hang_s=60) as load:
        _wait_for_load(load)
        registered = 0
        # What is taken once, when the first models come and go, is no growth.
        for _ in range(WARM_REGISTRATIONS):
            server.register_and_forget()
        time.sleep(seconds * WARM_UP)
        first, answered, began = server.take_census(), load.count("ok"), time.monotonic()
        looks = [(0.0, float(first.memory_bytes))]
        while (passed := time.monotonic() - began) < seconds:
            due = began + seconds * len(looks) / LOOKS
            while time.monotonic() < due:
                wanted = math.ceil(registrations * (time.monotonic() - began) / seconds)
                if registered < wanted and server.register_and_forget():
                    registered += 1
                time.sleep(0.02)
            looks.append((time.monotonic() - began, float(server.take_census().memory_bytes)))
            progress(int(passed))
        last = server.take_census()
    return Soak(
        passed,
        load.count("ok") - answered,
        registered,
        slope(looks) * 3600,
        slope_upper(looks) * 3600,
        last.descriptors - first.descriptors,
        last.threads - first.threads,
        last.processes - first.processes,
        len(last.names) - len(first.names),
        len(load.outcomes) - load.count("ok"),
    )


def slope(looks: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen): a few outliers do not move it."""
    return statistics.median(
        (y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(looks, 2) if x2 > x1
    )


def slope_upper(looks: Sequence[tuple[float, float]], rounds: int = 200) -> float:
    """95 % upper bound of the slope: of so many draws, with replacement, from the points."""
    chance = random.Random(0)
    drawn = sorted(slope(sorted(set(chance.choices(looks, k=len(looks))))) for _ in range(rounds))
    return drawn[int(rounds * 0.95)]
