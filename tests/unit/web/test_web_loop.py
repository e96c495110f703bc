"""The loop of a web worker by itself: real sockets, and an app of the test's own in place of Falcon's."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.eventually import eventually

from wsgi_ts.batcher.shm.board import Board, batcher_bell_name
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.request_codec import read_request
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.dataplane.exchange import Exchange
from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.dataplane.routes import Target
from wsgi_ts.http.head import Head
from wsgi_ts.logs.setup import LineLog
from wsgi_ts.rest.responses import UNEXPECTED
from wsgi_ts.settings.config import Config
from wsgi_ts.web.connection import TURN_BYTES, Connection, Phase
from wsgi_ts.web.listeners import Endpoint
from wsgi_ts.web.loop import WebLoop
from wsgi_ts.web.sending import send_queued

#: For connections of which none is answered.
NOWHERE: Any = None
KEEP_ALIVE = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answers with the path; `/raise` raises what Falcon would have caught, `/body` gives the body back."""
    error = environ.get("wsgi_ts.error")
    if error is not None:
        body = error.message.encode()
        start_response(f"{error.status} Error", [("content-length", str(len(body)))])
        return [body]
    if environ["PATH_INFO"] == "/raise":
        raise KeyError("a defect")
    body = environ["PATH_INFO"].encode()
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]


class Served:
    """A loop and its listening socket; `kinds` decides whether the app is called on the loop or on a thread."""

    def __init__(self, prefix: str, kinds: tuple[str, ...]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.signals, self._stop = os.pipe()
        settings: Any = SimpleNamespace(
            config=Config(), run_dir=Path("/nonexistent"), prefix=prefix, log_files=SimpleNamespace(access=LineLog("x"))
        )
        self.endpoint = Endpoint(self.listener, kinds, app)
        self.loop = WebLoop(settings, [self.endpoint], None, self.signals, lambda: True)

    def close(self) -> None:
        """Gives back what the loop of a process keeps until that ends."""
        for connection in list(self.loop.table.connections.values()):
            self.loop.table.close(connection)
        self.listener.close()
        self.loop.report.board.close()
        self.loop.table.epoll.close()
        for fd in (self.signals, self._stop, self.loop._wake_fd):
            os.close(fd)

    def ask(self, path: str) -> bytes:
        """Sends one request; returns all that comes until the server closes."""
        with socket.create_connection(self.address, timeout=60) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            return read_all(sock)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Runs the loop in a thread."""
        alive = True
        thread = threading.Thread(target=self.loop.run, args=(lambda: alive,))
        thread.start()
        try:
            yield
            assert thread.is_alive(), "the loop has ended"
        finally:
            alive = False
            os.write(self._stop, b"x")
            thread.join(60)
            assert not thread.is_alive()


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    prefix, threshold = f"wsgi-ts-{uuid.uuid4().hex}", gc.get_threshold()
    Board.create(prefix).close()
    each = Served(prefix, getattr(request, "param", ("inference",)))
    yield each
    each.close()
    # What the loop sets for a process that is all its own.
    gc.unfreeze()
    gc.set_threshold(*threshold)
    unlink_prefix(prefix)


@pytest.mark.parametrize("served", [("inference",), ("metrics",)], indirect=True, ids=["on the loop", "on a thread"])
def test_an_exception_costs_one_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with served.running(), socket.create_connection(served.address, timeout=60) as bystander:
        bystander.sendall(KEEP_ALIVE.format("/before").encode())
        assert bystander.recv(65536).endswith(b"/before")
        answer = served.ask("/raise")
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"connection: close\r\n" in answer
        assert answer.endswith(UNEXPECTED.encode())
        bystander.sendall(KEEP_ALIVE.format("/after").encode())
        assert bystander.recv(65536).endswith(b"/after")
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "GET /raise HTTP/1.1" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError
    board = Board.attach(served.loop.report.board.prefix)
    assert board.words[board.control_web_row + 2] == 1  # 5xx
    board.close()


def test_an_exception_in_the_reading_of_a_request_costs_one_request(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: bytes) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("wsgi_ts.http.head.unquote_to_bytes", broken)
    with served.running():
        assert served.ask("/bro%6ben").startswith(b"HTTP/1.1 500 ")
        assert served.ask("/whole").endswith(b"/whole")


class Broken(socket.socket):
    """A socket that fails when its answer has been sent and the connection is to end."""

    def shutdown(self, how: int, /) -> None:
        raise ZeroDivisionError


def test_an_exception_after_the_first_byte_closes_the_connection(served: Served) -> None:
    ours, theirs = socket.socketpair()
    broken = Broken(fileno=ours.detach())
    broken.setblocking(False)
    served.loop.welcome(broken, "/unix", served.endpoint)
    with served.running():
        theirs.sendall(b"GET /once HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = read_all(theirs)
        theirs.close()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert served.ask("/again").endswith(b"/again")


def test_a_stop_that_takes_longer_than_a_tick_answers_what_is_under_way(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsgi_ts.web.loop._TICK_S", 0.02)
    loop = served.loop
    _, client = pair(served)
    client.sendall(b"GET /late HTTP/1.1\r\n")
    thread = threading.Thread(target=loop.drain)
    thread.start()
    with contextlib.suppress(TimeoutError):
        client.settimeout(0.3)
        client.recv(1)
    client.settimeout(60)
    client.sendall(b"Host: x\r\n\r\n")
    assert read_all(client).endswith(b"/late")
    client.close()
    thread.join(60)
    assert not thread.is_alive()


def pair(served: Served) -> tuple[Connection, socket.socket]:
    """A connection in the loop's table, and its client's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    served.loop.welcome(ours, "/unix", served.endpoint)
    return served.loop.table.connections[ours.fileno()], theirs


def test_a_connection_is_not_taken_for_another_that_has_its_descriptor(served: Served) -> None:
    loop = served.loop
    first, client = pair(served)
    loop.table.close(first)
    client.close()
    second, client = pair(served)
    assert second.fd == first.fd
    first.buffer = KEEP_ALIVE.format("/late").encode()
    loop.table.ready.append(first)
    loop.go_on()
    loop.table.close(first)
    assert loop.table.connections[second.fd] is second
    assert not second.closed
    client.sendall(KEEP_ALIVE.format("/mine").encode())
    loop.turn()
    assert client.recv(65536).endswith(b"/mine")
    client.close()


def test_a_new_connection_does_not_get_the_events_of_the_one_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = served.loop
    first, client = pair(served)
    fd, listening = first.fd, served.listener.fileno()
    with socket.create_connection(served.address, timeout=60) as waiting:
        events = [(fd, select.EPOLLHUP), (listening, select.EPOLLIN), (fd, select.EPOLLHUP)]
        epoll = loop.table.epoll
        told: Any = SimpleNamespace(poll=lambda seconds: events, register=epoll.register, unregister=epoll.unregister)
        monkeypatch.setattr(loop.table, "epoll", told)
        loop.turn()
        assert first.closed
        assert fd in loop.table.connections
        monkeypatch.undo()
        waiting.sendall(KEEP_ALIVE.format("/mine").encode())
        loop.turn()
        assert waiting.recv(65536).endswith(b"/mine")
    client.close()


# Amounts


class Endless:
    """A socket that takes, and gives, whatever is asked for; counts it."""

    def __init__(self) -> None:
        self.moved = 0

    def fileno(self) -> int:
        return 99

    def send(self, data: bytes) -> int:
        self.moved += len(data)
        return len(data)

    def sendmsg(self, buffers: list[bytes]) -> int:
        return sum(map(self.send, buffers))

    def recv_into(self, buffer: memoryview) -> int:
        self.moved += len(buffer)
        return len(buffer)


@pytest.mark.parametrize("parts", [1, 500], ids=["one part", "many parts"])
def test_a_connection_sends_about_a_megabyte_in_a_turn(parts: int) -> None:
    sock: Any = Endless()
    connection = Connection(sock, "", NOWHERE)
    size = 20 * TURN_BYTES
    for _ in range(parts):
        connection.queue(bytes(size // parts))
    turns = 1
    while not send_queued(connection):
        assert sock.moved <= 3 * TURN_BYTES * turns
        turns += 1
    assert connection.unsent == 0
    assert sock.moved == size // parts * parts
    assert turns >= 7


class Supervisor:
    """What answers a process that wants a segment."""

    def __init__(self, run_dir: Path) -> None:
        pass

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return {"index": 1, "batchers": 1}

    def close(self) -> None:
        pass


@pytest.fixture
def exchange(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Exchange[Connection]:
    """What submits requests, to a batcher that is not there."""
    monkeypatch.setattr("wsgi_ts.dataplane.exchange.ControlPlane", Supervisor)
    prefix = served.loop.report.board.prefix
    Doorbell.create(batcher_bell_name(prefix, 0))
    config = Config(max_request_size=8 * TURN_BYTES, job_queue_size=1)
    instance: Any = SimpleNamespace(config=config, run_dir=tmp_path, prefix=prefix)
    made = Exchange[Connection](instance)
    monkeypatch.setattr(served.loop.table, "_exchange", made)
    return made


@pytest.mark.parametrize("reserved", [0, 8 * TURN_BYTES], ids=["a new slot", "a slot with room"])
def test_a_connection_receives_about_a_megabyte_in_a_turn(
    served: Served, exchange: Exchange[Connection], reserved: int
) -> None:
    client, length, turns = exchange.client, 8 * TURN_BYTES, 1
    loop = served.loop
    sock: Any = Endless()
    connection = Connection(sock, "", NOWHERE)
    head = Head(b"POST /predictions/m HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length)
    connection.head, connection.target = head, Target("m", None, 0, (0,))
    slot = client.take()
    assert slot is not None
    client.body_room(slot, reserved)
    connection.slot = slot
    connection.request_id = loop.table.ids.new()
    loop.requests.bodies.begin_direct(connection, head)
    while not exchange.waiting:
        assert sock.moved <= 2 * TURN_BYTES * turns
        loop.requests.receive_direct(connection)
        turns += 1
    assert turns >= 4
    assert exchange.waiting == {slot: connection}
    assert len(read_request(client.segment, slot)[-1]) == length
    assert sock.moved == length
    assert loop.table.receiving == 0


def test_of_too_much_unsent_the_slowest_readers_stream_ends(served: Served) -> None:
    loop = served.loop
    loop.table.unsent = Ledger(1000)
    slow, slow_client = pair(served)
    fast, fast_client = pair(served)
    for connection, size in ((slow, 900), (fast, 200)):
        connection.phase = Phase.STREAM
        connection.queue(bytes(size))
        loop.sender.limit_unsent(connection)
    assert slow.closed
    assert not fast.closed
    assert loop.table.unsent.total == 200
    loop.table.close(fast)
    assert loop.table.unsent.total == 0
    slow_client.close()
    fast_client.close()


def test_incomplete_bodies_have_one_limit_together(served: Served) -> None:
    served.loop.table.received = Ledger(10_000)
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"1770\r\n" + bytes(6000) + b"\r\n"
    with contextlib.ExitStack() as stack:
        stack.enter_context(served.running())
        first, second = (stack.enter_context(socket.create_connection(served.address, timeout=60)) for _ in range(2))
        first.sendall(head + chunk)
        served.ask("/ping")  # the loop has read what was sent before
        second.sendall(head + chunk)
        refused = second.recv(65536)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"Too many bytes of incomplete requests" in refused
        first.sendall(b"0\r\n\r\n")
        assert first.recv(65536).endswith(b"/a")
        eventually(lambda: served.loop.table.received.total == 0, within=20)


def test_what_is_sent_ahead_of_an_answer_stays_limited_while_that_is_streamed(served: Served) -> None:
    connection, client = pair(served)
    client.settimeout(60)
    connection.phase = Phase.STREAM
    client.setblocking(False)
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            client.send(bytes(65536))
        served.loop.table.look_at_ns = 0  # a turn that waits for nothing
        served.loop.turn()
        served.loop.sender.continue_sending(connection)
    assert len(connection.buffer) <= 3 * 65536
    client.close()
