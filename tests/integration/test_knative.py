"""The server beside Knative's queue-proxy: probed without a pause from its start on, one request at a time, stopped."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import request
from support.server import ServerProcess

#: How long queue-proxy waits between two probes while a container starts, in seconds.
PROBE_S = 0.05
#: Takes a moment to load.
ALONE = """
import os, time

def handle(data, context):
    if data is None:
        time.sleep(0.5)
        return None
    assert len(data) == 1
    return [row["body"] for row in data]
"""


class QueueProxy:
    """What stands before the container: probes it, and lets `limit` requests in at a time; a context manager.

    Attributes:
        probes: what each probe has found: "refused", or the status of /readyz; in order, without repetitions.
    """

    def __init__(self, port: int, limit: int = 1) -> None:
        self.probes: list[str] = []
        self._port = port
        self._room = threading.BoundedSemaphore(limit)
        self._idle: list[http.client.HTTPConnection] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._probe)

    def __enter__(self) -> QueueProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        for connection in self._idle:
            connection.close()

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Passes a request on, when there is room."""
        with self._room:
            connection = self._idle.pop() if self._idle else http.client.HTTPConnection("127.0.0.1", self._port)
            headers = {"content-type": "application/octet-stream", "k-network-probe": "", "forwarded": "for=10.0.0.1"}
            connection.request("POST", "/predictions/alone", body, headers)
            reply = connection.getresponse()
            answer = reply.status, reply.read()
            if reply.will_close:
                connection.close()
            else:
                self._idle.append(connection)
            return answer

    def _probe(self) -> None:
        while not self._stopping.wait(PROBE_S):
            found = self._look()
            if self.probes[-1:] != [found]:
                self.probes.append(found)

    def _look(self) -> str:
        """A TCP probe, and one by HTTP."""
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=60).close()
            headers = {"user-agent": "kube-probe/0", "k-network-probe": "queue"}
            return str(request(self._port, "GET", "/readyz", headers=headers).status)
        except ConnectionRefusedError:
            return "refused"


@pytest.fixture
def container(store: Path) -> Iterator[ServerProcess]:
    """A server that is not waited for."""
    archive(store, "alone", ALONE)
    flags = ["--models", "alone=alone.mar"]
    server = ServerProcess(store=store, arguments=flags, config={"default_workers_per_model": "1"})
    server.start(ready=False)
    try:
        yield server
    finally:
        server.stop()


def test_from_a_cold_start_to_the_end(container: ServerProcess) -> None:
    with QueueProxy(container.ports["inference"]) as proxy:
        began = time.monotonic()
        eventually(lambda: proxy.probes[-1:] == ["200"], within=60, what="the first successful probe")
        print(f"ready after {time.monotonic() - began:.2f} s")  # shown by -s
        bodies = [str(number).encode() for number in range(40)]
        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(proxy.ask, bodies)) == [(200, body) for body in bodies]
        # Once ready, always ready; before that it refused, or said that it is not.
        assert proxy.probes[-1] == "200"
        assert set(proxy.probes[:-1]) <= {"refused", "503"}
    container.note_prefix()
    os.kill(container.record["pid"], signal.SIGTERM)
    eventually(lambda: container.returncode == 0, within=30)
    assert not container.leftovers()
