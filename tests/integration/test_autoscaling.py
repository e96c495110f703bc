"""Servers behind nginx, as many as a HorizontalPodAutoscaler wants by the gauges of deploy/kubernetes/hpa.yaml."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import pytest
import yaml
from lifecycle.autoscaler import Autoscaler
from support import debian, http
from support.archives import archive
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess, free_ports

debian.needs("nginx")
pytestmark = pytest.mark.slow

#: Seconds between two scrapes, where a cluster has 15, and of the stabilisation window, where hpa.yaml has 300.
SCRAPE_S = 3.0
WINDOW_S = 15.0
#: How long the load is steady, in seconds: the rates that the gauges show are over ten.
STEADY_S = 12.0
MOST = 4
#: Half of what one server can do, so that one is enough at 70 %, and the triple takes three.
USUAL_RPS = 5.0
#: What is more than that, in seconds, and on average: requests have waited, for whatever reason.
MOST_S, MEAN_S = 0.5, 0.13
#: How long a change may take, in seconds, whatever else the machine does.
LIMIT_S = 300.0
HANDLER = """
import time

def handle(data, context):
    if data is None:
        return None
    time.sleep(0.1)
    return [row["body"] for row in data]
"""
NGINX = """
daemon off; worker_processes 1; pid FOLDER/nginx.pid; error_log FOLDER/error.log;
events { worker_connections 512; }
http {
  access_log off;
  PLACES
  upstream servers { SERVERS keepalive 16; }
  server {
    listen 127.0.0.1:PORT;
    location / { proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
"""


class Fleet:
    """Servers behind nginx; a context manager. One is ended when nobody sends to it any more, and drains."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = folder / "store"
        self._store.mkdir()
        archive(self._store, "slow", HANDLER)
        self.servers: list[ServerProcess] = []
        (self.port,) = free_ports(1)
        self._nginx: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Fleet:
        self.scale(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait(60)
        for server in self.servers:
            assert not server.stop()

    def scale(self, count: int) -> None:
        """Starts or ends servers, and returns when they are ready or have ended."""
        while len(self.servers) < count:
            server = ServerProcess(store=self._store, config={"metrics_mode": "prometheus"})
            server.start()
            assert server.register("slow.mar").status == 200
            self.servers.append(server)
        self.servers, ended = self.servers[:count], self.servers[count:]
        self._route()
        for server in ended:
            assert not server.stop()

    def scrape(self, name: str) -> list[float]:
        """The values of a gauge, of the servers that have it."""
        texts = [server.request("metrics", "GET", "/metrics").text for server in self.servers]
        found = [re.search(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for text in texts]
        return [float(each[1]) for each in found if each is not None]

    def _route(self) -> None:
        servers = " ".join(f"server 127.0.0.1:{each.ports['inference']};" for each in self.servers)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = " ".join(f"{kind}_temp_path {self._folder}/{kind};" for kind in kinds)
        text = NGINX.replace("FOLDER", os.fspath(self._folder)).replace("PLACES", places)
        text = text.replace("SERVERS", servers).replace("PORT", str(self.port))
        configuration = self._folder / "nginx.conf"
        configuration.write_text(("user root;" if os.getuid() == 0 else "") + text)
        if self._nginx is None:
            program = debian.program("nginx")
            assert program is not None
            self._nginx = subprocess.Popen([program, "-p", os.fspath(self._folder), "-c", os.fspath(configuration)])
            eventually(self._answers, within=20, what="start of nginx")
            return
        workers = self._workers()
        self._nginx.send_signal(signal.SIGHUP)
        # The old workers have finished what they had when they are gone.
        eventually(lambda: self._workers() and not self._workers() & workers, within=60, what="nginx's new workers")

    def _answers(self) -> bool:
        try:
            return http.request(self.port, "GET", "/ping").status == 200
        except OSError:
            return False

    def _workers(self) -> set[str]:
        assert self._nginx is not None
        path = Path(f"/proc/{self._nginx.pid}/task/{self._nginx.pid}/children")
        return set(path.read_text().split())


class Load:
    """Requests at a rate, whether they are answered or not; a context manager.

    Attributes:
        outcomes: how many ended how.
    """

    def __init__(self, port: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._rate = 0.0
        self._next_at = 0.0
        #: When each request was sent, and when it was answered, which those that wait were not yet.
        self._under_way: dict[object, float] = {}
        self._answered: deque[tuple[float, float]] = deque(maxlen=1000)
        self._port = port
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._pool.shutdown()

    def set_rate(self, rate: float) -> None:
        """Sends so many requests a second from now on."""
        self._rate, self._next_at = rate, time.monotonic()

    def has_waited(self) -> bool:
        """Whether requests wait, or have waited within the time that the gauges look back."""
        now = time.monotonic()
        took = [ended - began for began, ended in list(self._answered) if now - ended < WINDOW_S]
        took += [now - began for began in list(self._under_way.values())]
        return bool(took) and (max(took) > MOST_S or sum(took) / len(took) > MEAN_S)

    def _send(self) -> None:
        while not self._stopping.wait(max(0.0, self._next_at - time.monotonic()) if self._rate else 0.1):
            if self._rate:
                # By the clock: a moment in which this thread does not run costs no request.
                self._next_at += 1 / self._rate
                self._pool.submit(self._ask)

    def _ask(self) -> None:
        mark = object()
        began = self._under_way[mark] = time.monotonic()
        try:
            self._exchange()
        finally:
            del self._under_way[mark]
            self._answered.append((began, time.monotonic()))

    def _exchange(self) -> None:
        headers = {"content-type": "application/octet-stream"}
        try:
            reply = http.request(self._port, "POST", "/predictions/slow", body=b"x", headers=headers, timeout=60)
            self.outcomes["ok" if (reply.status, reply.body) == (200, b"x") else f"{reply.status} {reply.text}"] += 1
        except OSError as error:
            self.outcomes[repr(error)] += 1


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as running:
        yield running


def rule() -> Autoscaler:
    """The autoscaler of hpa.yaml, from one server on and with a shorter window."""
    (spec,) = (each["spec"] for each in yaml.safe_load_all((REPOSITORY / "deploy/kubernetes/hpa.yaml").read_text()))
    pods = [each["pods"] for each in spec["metrics"]]
    targets = {each["metric"]["name"]: int(each["target"]["averageValue"].removesuffix("m")) / 1000 for each in pods}
    return Autoscaler(targets, least=1, most=MOST, window_s=WINDOW_S)


@dataclass(frozen=True)
class Step:
    """How many servers there were from some time on, and whether clients had waited just before."""

    count: int
    has_waited: bool = False


def follow(
    fleet: Fleet, autoscaler: Autoscaler, load: Load, seconds: float, until: Callable[[int], bool] = lambda _: False
) -> list[Step]:
    """Lets the autoscaler work for so long, or until there are as many servers as are wanted.

    Returns:
        How many there were at first, and each time that this changed.
    """
    steps = [Step(len(fleet.servers))]
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end and not until(steps[-1].count):
        values = {name: fleet.scrape(name) for name in autoscaler.targets}
        wanted = autoscaler.desired(now, len(fleet.servers), values)
        if wanted != len(fleet.servers):
            steps.append(Step(wanted, load.has_waited()))
            fleet.scale(wanted)
        time.sleep(max(0.0, SCRAPE_S - (time.monotonic() - now)))
    return steps


def unasked(steps: list[Step]) -> list[Step]:
    """Servers that were added though no client had waited: where the machine holds a server up, they are of use."""
    return [after for before, after in pairwise(steps) if after.count > before.count and not after.has_waited]


def test_a_load_that_triples_and_ends(fleet: Fleet) -> None:
    autoscaler = rule()
    with Load(fleet.port) as load:
        load.set_rate(USUAL_RPS)
        usual = follow(fleet, autoscaler, load, STEADY_S)
        assert not unasked(usual), usual
        follow(fleet, autoscaler, load, LIMIT_S, until=lambda count: count == 1)
        assert len(fleet.servers) == 1
        load.set_rate(3 * USUAL_RPS)
        up = follow(fleet, autoscaler, load, LIMIT_S, until=lambda count: count >= 3)
        up += follow(fleet, autoscaler, load, 2 * STEADY_S)[1:]
        # It may take back what it added at first, but never go to and fro.
        fall = next((place for place, (one, other) in enumerate(pairwise(up)) if other.count < one.count), len(up))
        assert not unasked(up[fall:]), up
        assert 3 <= up[-1].count <= MOST, up
        load.set_rate(0.0)
        down = follow(fleet, autoscaler, load, LIMIT_S, until=lambda count: count == 1)
        assert not unasked(down), down
        assert down[-1].count == 1, down
    assert load.outcomes.keys() == {"ok"}, load.outcomes
    print(up, down, load.outcomes)  # shown by -s
