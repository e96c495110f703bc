"""The load generator against small servers over real sockets."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from wsgi_ts.security.certificates import self_signed
from wsgi_ts.tune.generator import Generator, LoadError, Target
from wsgi_ts.tune.objective import percentile

REQUEST = b"POST /predictions/m HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"


class Server(ThreadingHTTPServer):
    """Answers after a while, one request at a time where it `is_narrow`; `bodies` holds what came."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, status: int = 200, delay_s: float = 0.0, *, is_narrow: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.delay_s = status, delay_s
        self.lock = threading.Lock() if is_narrow else None
        self.bodies: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.lock is not None:
            with self.server.lock:
                time.sleep(self.server.delay_s)
        else:
            time.sleep(self.server.delay_s)
        body = b'{"code": 400, "message": "no such luck"}'
        head = f"HTTP/1.1 {self.server.status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        self.wfile.write(head + body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(server: Server, *, tls: bool = False) -> Iterator[Generator]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    target = Target([REQUEST + b"one ", REQUEST + b"two "], "127.0.0.1", server.server_address[1], tls=tls)
    try:
        with Generator(target, 1) as generator:
            yield generator
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_clients_wait_for_their_answers() -> None:
    server = Server(delay_s=0.05)
    with serving(server) as generator:
        found = generator.clients(4, 2.0)
    assert found.failed == 0
    assert 4 <= len(found.latencies_s) <= 4 * 2.0 / 0.05
    assert found.latencies_s[0] >= 0.05
    assert abs(server.bodies.count(b"one ") - server.bodies.count(b"two ")) <= 1


def test_requests_come_at_random_whatever_the_server_does() -> None:
    """A server that does one request in 20 ms gets 100 a second: they wait longer and longer, and that is told."""
    with serving(Server(delay_s=0.02, is_narrow=True)) as generator:
        found = generator.at_random(100, 1.5, 0.0)
    assert 100 < found.sent < 200
    assert percentile(found.latencies_s, 99) > 0.5
    assert percentile(found.latencies_s, 50) > 0.2


def test_other_answers_than_200_are_failures_with_their_text() -> None:
    with serving(Server(status=400)) as generator:
        found = generator.clients(1, 2.0, 0.0)
    assert not found.latencies_s
    assert found.failed == found.statuses[400] > 0
    assert found.refusal == "400 no such luck"


def test_tls_with_whatever_certificate(tmp_path: Path) -> None:
    pem = tmp_path / "own.pem"
    pem.write_bytes(self_signed(["elsewhere"]).to_pem())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = Server()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server, tls=True) as generator:
        found = generator.at_random(50, 2.0, 0.0)
    assert found.failed == 0
    assert found.latencies_s


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Generator(Target([REQUEST + b"one "], "127.0.0.1", port), 1) as generator:
        found = generator.clients(2, 0.2, 0.0)
    assert found.failed == 2
    assert found.refusal.startswith("no connection")


def test_a_generator_that_was_killed_is_told() -> None:
    with serving(Server()) as generator:
        generator.clients(1, 0.1, 0.0)
        generator._processes[0]._process.kill()
        with pytest.raises(LoadError, match="has ended"):
            generator.clients(1, 0.1, 0.0)
