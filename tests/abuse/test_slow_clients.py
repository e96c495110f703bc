"""Clients in thousands that send or read a byte now and then: everybody else is served."""

from __future__ import annotations

import contextlib
import resource
import socket
import statistics
import time
from collections.abc import Iterator

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess
from support.slots import slots_in_use

pytestmark = pytest.mark.chaos

CONNECTIONS = 5000
READERS = 300
#: Answers with as many bytes as the body says.
LARGE = """
def handle(data, context):
    if data is None:
        return None
    return [b"x" * int(bytes(row["body"])) for row in data]
"""
ANSWER_BYTES = 2_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * CONNECTIONS:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CONNECTIONS), hard))
    try:
        # There is a place for each of them.
        with ServerProcess(config={"slots_per_worker": "1024", "job_queue_size": "1000"}) as server:
            archive(server.store, "large", LARGE)
            assert server.register("large.mar").status == 200
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(server: ServerProcess, receive_bytes: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", server.ports["inference"]))
    return sock


def ask(server: ServerProcess, size: int = 3) -> http.Reply:
    return server.predict("large", str(size), content_type="application/octet-stream")


def median_s(server: ServerProcess) -> float:
    """How long a request takes; every one of them has to be answered."""
    took = []
    for _ in range(40):
        began = time.monotonic()
        assert ask(server).body == b"xxx"
        took.append(time.monotonic() - began)
    return statistics.median(took)


def test_slow_heads_and_bodies_in_thousands(server: ServerProcess) -> None:
    request = b"POST /predictions/large HTTP/1.1\r\nHost: x\r\nX: y\r\nContent-Length: 100\r\n\r\n" + b"1" * 100
    before = median_s(server)
    with contextlib.ExitStack() as sockets:
        slow = []
        for number in range(CONNECTIONS):
            slow.append(sockets.enter_context(connect(server)))
            slow[-1].sendall(request[: 1 + number % (len(request) - 3)])
        for _ in range(2):
            for sock in slow:
                # One that took longer than a head may has been answered 408, and closed.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(b"1")
            meanwhile = median_s(server)
            print(f"beside {CONNECTIONS} slow connections a request takes {meanwhile / before:.1f} times as long")
        assert server.request("management", "GET", "/models").status == 200
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="no slot in use")
    assert ask(server).status == 200


def test_slow_readers_of_large_answers(server: ServerProcess) -> None:
    before = median_s(server)
    request = b"POST /predictions/large HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%d"
    body = b"%d" % ANSWER_BYTES
    with contextlib.ExitStack() as sockets:
        for _ in range(READERS):
            sock = sockets.enter_context(connect(server, receive_bytes=4096))
            sock.sendall(request % (len(body), ANSWER_BYTES))
        served = [ask(server) for _ in range(50)]
        assert [reply.status for reply in served] == [200] * 50
        print(f"beside {READERS} slow readers a request takes {median_s(server) / before:.1f} times as long")
        # One of them makes up its mind, and has its answer whole.
        sock.settimeout(30)
        received = b""
        while len(received) < ANSWER_BYTES:
            received += (part := sock.recv(1 << 20))
            assert part, received[:300]
        assert received.startswith(b"HTTP/1.1 200") and received.endswith(b"x" * 1000)
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="no slot in use")
    assert ask(server).status == 200


def test_who_stalls_in_a_body_that_is_refused_is_let_go(server: ServerProcess) -> None:
    """What has come fast gives a client time to finish, and none to stay."""
    with contextlib.closing(connect(server)) as sock:
        sock.sendall(b"POST /predictions/large HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n")
        sock.sendall(bytes(30_000_000))
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")

        def is_closed() -> bool:
            try:
                sock.send(b"x")
            except (ConnectionResetError, BrokenPipeError):
                return True
            return False

        eventually(is_closed, within=60, what="the end of the connection")
