"""Raw requests against the running server: whole, in pieces, pipelined, many times, and mutated at random.

Whatever a client sends, it is answered or the connection is closed; nothing of it is taken for a second request; the
web workers live on with all their slots free, and their logs hold no traceback.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import psutil
import pytest
from corpus.requests import CASES, ECHO, HIDDEN, MAX_BODY, Case, chunked, request, with_length
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.answers import parse_answers
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess
from support.slots import slots_in_use

APIS = ("inference", "management")
#: Requests up to this size are cut at every byte.
CUT_EVERYWHERE = 300
#: So few at once that the second piece comes long before the ten seconds are over that a head may take.
CUTS_AT_ONCE = 60
#: What the server reads of a refused request before it closes; above that, closing may destroy the answer on its way.
SURELY_READ = 250_000
#: So long nobody waits for the server: it ends whatever it still waits for before, with an answer that says so.
HANG_S = 60.0
#: Requests mutated at random, for each API; other ones in each run. `make fuzz` sends many more.
FUZZ_REQUESTS = int(os.environ.get("WSGI_TS_FUZZ_REQUESTS", "300"))

#: Answers with the body as it came: text and JSON that were decoded on the way as Python shows them.
TELL = """
def tell(value):
    if isinstance(value, (bytes, bytearray)):
        return value
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "replace")

def handle(data, context):
    if data is None:
        return None
    return [tell(row.get("body", b"")) for row in data]
"""

GOOD = {
    "inference": with_length(b"good", "Connection: close"),
    "management": request("Connection: close", method="GET", target="/models?limit=1"),
}
GOOD_ANSWER = {"inference": b"good", "management": b'"modelName": "echo"'}


@dataclass
class Watched:
    """The server under test and what must stay as it is."""

    server: ServerProcess
    workers: dict[str, frozenset[int]] = field(default_factory=dict)
    read_of_log: int = 0

    def __post_init__(self) -> None:
        self.workers = self._workers()

    def _workers(self) -> dict[str, frozenset[int]]:
        roles = ("web-worker", "management-worker", "batcher", "model-worker")
        return {role: frozenset(process.pid for process in self.server.processes(role)) for role in roles}

    def assert_unharmed(self) -> None:
        """Same processes, all slots free, no traceback, and an answer for a good request."""
        dead = [pid for pids in self.workers.values() for pid in pids if not psutil.pid_exists(pid)]
        assert not dead, self.server.output()[-3000:]
        prefix = self.server.prefix
        eventually(lambda: not slots_in_use(prefix), within=5, what="all slots free")
        text = self.server.output()[self.read_of_log :]
        assert "Traceback" not in text, text[-3000:]
        self.read_of_log += len(text)
        for api in APIS:
            (answer,) = parse_answers(exchange(self.server, api, GOOD[api]))
            assert answer.status == 200
            assert GOOD_ANSWER[api] in answer.body

    def assert_same_processes(self) -> None:
        """The full look, by role: slower."""
        assert self._workers() == self.workers


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo", TELL)
    config = {
        "max_request_size": str(MAX_BODY),
        "max_response_size": str(1 << 20),
        "job_queue_size": "1000",
        # A case is cut at up to CUT_EVERYWHERE places at once, each a request of the same model.
        "slots_per_worker": "512",
    }
    with ServerProcess(store=store, config=config) as server:
        reply = server.register("echo.mar", batch_size=8)
        assert reply.status == 200, reply.text
        watched = Watched(server)
        yield watched
        watched.assert_unharmed()
        watched.assert_same_processes()


def connect(server: ServerProcess, api: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.ports[api]), timeout=HANG_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, data: bytes) -> None:
    """Sends; a server that has closed already is no error."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


def read_all(sock: socket.socket) -> bytes:
    """Reads until the server closes.

    Raises:
        TimeoutError: it does not.
    """
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def exchange(server: ServerProcess, api: str, *pieces: bytes, half_close: bool = False) -> bytes:
    """Sends the pieces one by one on a new connection and reads until the server closes it."""
    with connect(server, api) as sock:
        for piece in pieces:
            send(sock, piece)
        if half_close:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def judge(case: Case, api: str, received: bytes) -> None:
    """Holds what came back to what the case allows; a good request was sent behind it unless it is unfinished."""
    allowed = case.statuses if api == "inference" else case.management
    answers = parse_answers(received, [case.raw.lstrip().split(b" ")[0].decode("latin-1")])
    if not answers and (None in allowed or len(case.raw) > SURELY_READ):
        return
    assert answers, "closed without an answer"
    first, *more = answers
    assert first.status in allowed, first
    if first.status >= 400:
        assert not more, f"an answer behind the error: {more}"
        return
    if case.body is not None:
        assert first.body == case.body
    assert not case.unfinished
    assert [answer.status for answer in more] == [200], more
    assert GOOD_ANSWER[api] in more[0].body


def ids(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_whole_and_pipelined(watched: Watched, case: Case, api: str) -> None:
    if case.unfinished:
        received = exchange(watched.server, api, case.raw, half_close=True)
    else:
        received = exchange(watched.server, api, case.raw + GOOD[api])
    judge(case, api, received)
    watched.assert_unharmed()


SHORT = [case for case in CASES if len(case.raw) <= CUT_EVERYWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_cut_in_two_at_every_byte(watched: Watched, case: Case) -> None:
    """Many cuts at once: while the others' first pieces are sent, the server reads the one before."""
    places = range(1, len(case.raw) + 1)
    for first in range(0, len(places), CUTS_AT_ONCE):
        cut_at(watched, case, places[first : first + CUTS_AT_ONCE])
    watched.assert_unharmed()


def cut_at(watched: Watched, case: Case, places: Sequence[int]) -> None:
    """Sends a request on a connection for each of the places, cut in two there."""
    data = case.raw if case.unfinished else case.raw + GOOD["inference"]
    with contextlib.ExitStack() as sockets:
        cut = []
        for at in places:
            sock = sockets.enter_context(connect(watched.server, "inference"))
            send(sock, data[:at])
            cut.append((at, sock))
        for at, sock in cut:
            send(sock, data[at:])
            if case.unfinished:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
        for _, sock in cut:
            judge(case, "inference", read_all(sock))


BYTE_BY_BYTE = (
    "chunks",
    "trailers",
    "extension",
    "a hidden request in a chunk",
    "a hidden request in the body",
    "bare LF in an extension",
    "length and chunked",
    "leading empty lines",
    "continue",
    "multipart: good",
    "not HTTP: noise",
)


@pytest.mark.parametrize("name", BYTE_BY_BYTE)
def test_byte_by_byte(watched: Watched, name: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    data = case.raw + GOOD["inference"]
    received = exchange(watched.server, "inference", *[data[at : at + 1] for at in range(len(data))])
    judge(case, "inference", received)
    watched.assert_unharmed()


HEAVY = (
    "a header line of 1 MB",
    "extension of 1 MB",
    "trailers of 1 MB",
    "200 000 chunks of one byte",
    "chunks above the limit",
    "multipart: many delimiters",
    "multipart: 1000 parts",
    "multipart: many dashes",
    "JSON: 50 000 deep",
    "JSON: quotes without an end",
    "JSON: backslash at the end",
    "form: 100 000 separators",
)
REPETITIONS = 50
#: 1 MiB per 100 requests.
MOST_GROWTH = (1 << 20) * REPETITIONS // 100


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_memory_does_not_grow(watched: Watched, name: str) -> None:
    (case,) = [case for case in CASES if case.name == name]

    def repeat() -> int:
        for _ in range(REPETITIONS):
            judge(case, "inference", exchange(watched.server, "inference", case.raw + GOOD["inference"]))
        pids = [pid for role in ("web-worker", "model-worker") for pid in watched.workers[role]]
        return sum(psutil.Process(pid).memory_full_info().uss for pid in pids)

    # The allocator may keep what one round needed; what grows with every round is a leak.
    used = [repeat() for _ in range(4)]
    assert min(after - before for before, after in pairwise(used)) < MOST_GROWTH, used
    watched.assert_unharmed()


def test_a_hundred_pipelined_requests(watched: Watched) -> None:
    bodies = [b"%d" % number for number in range(100)]
    received = exchange(watched.server, "inference", *[with_length(body) for body in bodies], GOOD["inference"])
    assert [answer.body for answer in parse_answers(received)] == [*bodies, b"good"]


def test_nothing_behind_an_error_is_read(watched: Watched) -> None:
    bad = request(target="/predictions/nope")
    answers = parse_answers(exchange(watched.server, "inference", with_length(b"1") + bad + with_length(b"2") * 50))
    assert [answer.status for answer in answers] == [200, 404]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0"])
def test_an_upgrade_is_not_made(watched: Watched, api: str, upgrade: str) -> None:
    """Answered as it stands; the connection ends, as what follows may be another protocol."""
    raw = request(
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {upgrade}",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        method="GET",
        target="/api-description",
    )
    (answer,) = parse_answers(exchange(watched.server, api, raw + GOOD[api]))
    assert answer.status == 200
    assert "upgrade" not in answer.headers
    watched.assert_unharmed()


def test_a_too_large_body_is_not_read(watched: Watched) -> None:
    """Of what is announced, and of what comes in chunks without end, no more than the limit and a little is taken."""
    sent = 0
    with connect(watched.server, "inference") as sock:
        send(sock, chunked(b""))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            while sent < 64 << 20:
                sock.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                sent += 0x4000
    assert sent < 64 << 20
    watched.assert_unharmed()


def test_expecting_client_with_a_good_body_is_told_to_go_on(watched: Watched) -> None:
    with connect(watched.server, "inference") as sock:
        sock.sendall(request("Content-Length: 3", "Expect: 100-continue", "Connection: close"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert parse_answers(read_all(sock))[0].body == b"abc"


# Clients that go away (N1, N2)


WHOLE = with_length(b"x" * 20_000)


@pytest.mark.parametrize("hard", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /pred", WHOLE[:60], WHOLE[:-1], WHOLE, WHOLE + WHOLE[:-1], WHOLE + request("Content-Length: 9")],
    ids=["nothing", "line", "head", "body", "all", "next body", "next head"],
)
def test_a_client_that_goes_away_leaves_nothing(watched: Watched, sent: bytes, hard: bool) -> None:
    for pause in (0.0, 0.002):
        for _ in range(10):
            sock = connect(watched.server, "inference")
            sock.sendall(sent)
            time.sleep(pause)
            if hard:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
    watched.assert_unharmed()


@pytest.mark.parametrize("api", APIS)
def test_a_half_closed_client_is_answered(watched: Watched, api: str) -> None:
    (answer,) = parse_answers(exchange(watched.server, api, GOOD[api], half_close=True))
    assert answer.status == 200


def test_slow_clients_keep_nobody_waiting(watched: Watched) -> None:
    with contextlib.ExitStack() as sockets:
        slow = [sockets.enter_context(connect(watched.server, "inference")) for _ in range(200)]
        for number, sock in enumerate(slow):
            sock.sendall(WHOLE[: 20 + number * 5])
        for _ in range(3):
            for sock in slow:
                sock.sendall(b"x")
            assert watched.server.predict("echo", b"quick").body == b"quick"
    watched.assert_unharmed()


@pytest.mark.slow
def test_a_head_that_does_not_end_is_given_up(watched: Watched) -> None:
    """Bytes that keep coming do not put off the limit of 10 s."""
    with connect(watched.server, "inference") as sock:
        end = time.monotonic() + 60
        sock.sendall(b"POST /predictions/echo HTTP/1.1\r\nX: ")
        sock.setblocking(False)
        received = b""
        while time.monotonic() < end and not received:
            send(sock, b"y")
            time.sleep(0.2)
            with contextlib.suppress(BlockingIOError):
                received = sock.recv(65536)
    assert parse_answers(received)[0].status == 408


# Mutations


SEEDS = (
    with_length(b"hello"),
    with_length(b'{"a": [1, 2, {"b": null}]}', "Content-Type: application/json"),
    with_length(b"body=x&y=1+2&z=%41", "Content-Type: application/x-www-form-urlencoded"),
    chunked(b"3\r\nabc\r\n5;x=y\r\nhello\r\n0\r\nTrailer: x\r\n\r\n"),
    with_length(b"abc", "Expect: 100-continue") + with_length(b"next"),
    request("Connection: keep-alive, Upgrade", "Upgrade: x", target="http://x/predictions/echo/1.0/a/b?c=d"),
    with_length(
        b'--b\r\nContent-Disposition: form-data; name="body"; filename="f"\r\nContent-Type: text/plain\r\n\r\n'
        b"x\r\n--b--\r\n",
        "Content-Type: multipart/form-data; boundary=b",
    ),
    request(method="OPTIONS", target="/"),
    request(method="PUT", target="/models/echo?min_worker=1&max_worker=1"),
    request(method="GET", target="/invocations?model_name=echo&x=%20"),
)
TOKENS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"%00", b"%ff", b"#", b"?", b"/", b".."),
    *(b"-1", b"0", b"chunked", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\n"),
    *(b"Expect: 100-continue\r\n", b"\r\n\r\n", b"\xff", b"\xe2\x80\xae", b"[" * 200, b"HTTP/1.0", b"--b", b"--b--"),
    *(HIDDEN, b"a" * 5000),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good request with one to four things done to it."""
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 20)))
        match draw(st.integers(0, 4)):
            case 0:
                data = data[:at] + data[end:]
            case 1:
                data = data[:end] + data[at:]
            case 2:
                data = data[:at] + draw(st.sampled_from(TOKENS)) + data[end:]
            case 3:
                data = data[:at] + draw(st.binary(max_size=8)) + data[end:]
            case _:
                data = data[:at] + data[at:end].swapcase() + data[end:]
    return data


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_mutated_requests(watched: Watched, api: str) -> None:
    started_from = int(os.environ.get("WSGI_TS_FUZZ_SEED") or secrets.randbits(32))
    print(f"again with: WSGI_TS_FUZZ_SEED={started_from} WSGI_TS_FUZZ_REQUESTS={FUZZ_REQUESTS}")

    @seed(started_from)
    @settings(max_examples=FUZZ_REQUESTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated())
    def check(data: bytes) -> None:
        answers = parse_answers(exchange(watched.server, api, data, half_close=True))
        assert all(answer.status < 500 or answer.status == 501 for answer in answers), answers
        assert all(answer.status < 400 for answer in answers[:-1]), "an answer behind an error"
        assert sum(answer.status < 400 for answer in answers) <= data.count(b"HTTP/1.")

    check()
    watched.assert_unharmed()
    watched.assert_same_processes()


def test_the_access_log_holds_no_raw_control_bytes(watched: Watched) -> None:
    for target in ("/%0d%0aX", "/predictions/%1b[31m", "/%00"):
        exchange(watched.server, "inference", request(target=target))
    text = eventually(lambda: watched.server.log("access_log.log"), within=5)
    assert not [line for line in text.splitlines() if any(ord(char) < 32 or ord(char) == 127 for char in line)]


@pytest.mark.parametrize("target", [ECHO, "/nope", "/predictions/nope"])
def test_head_answers_as_get_without_the_body(watched: Watched, target: str) -> None:
    get, head = (
        parse_answers(
            exchange(watched.server, "inference", request("Connection: close", method=method, target=target)), [method]
        )[0]
        for method in ("GET", "HEAD")
    )
    different = ("x-request-id",)
    assert head.body == b""
    assert head.status == get.status
    assert {k: v for k, v in head.headers.items() if k not in different} == {
        k: v for k, v in get.headers.items() if k not in different
    }
