"""Predictions over real sockets: framing, keep-alive, pipelining, big bodies, streams, and many clients at once."""

from __future__ import annotations

import http.client
import random
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import RawConnection, exchange
from support.server import ServerProcess

MAX_REQUEST = 8 << 20

#: Says how it was reached: its headers `url_path` and `explain`, and its own version.
PATHS = """
def handle(data, context):
    if data is None:
        return None
    version = context.manifest["model"]["modelVersion"]
    return [
        {
            "version": version,
            "url_path": context.get_request_header(i, "url_path"),
            "explain": context.get_request_header(i, "explain"),
            "keys": sorted(row),
        }
        for i, row in enumerate(data)
    ]
"""

#: Sends one chunk, and the next only when the file that the request names exists.
STREAM = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    gate = bytes(data[0]["body"]).decode()
    for number in range(3):
        send_intermediate_predict_response(
            ["part%d" % number], context.request_ids, "Intermediate Prediction success", 200, context
        )
        deadline = time.monotonic() + 100
        while not os.path.exists(gate + str(number)) and time.monotonic() < deadline:
            time.sleep(0.005)
    return ["end"]
"""

#: Waits for a file, sends one chunk, leaves another file, and fails.
BROKEN_STREAM = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    gate = bytes(data[0]["body"]).decode()
    open(gate + "begun", "w").close()
    deadline = time.monotonic() + 20
    while not os.path.exists(gate + "go") and time.monotonic() < deadline:
        time.sleep(0.005)
    send_intermediate_predict_response(["part"], context.request_ids, "Intermediate", 200, context)
    raise ValueError("after the first part")
"""

#: Waits for a file, so that a test decides when the worker is free again.
GATED = """
import os, time

def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        body = bytes(row["body"])
        if body.startswith(b"wait:"):
            deadline = time.monotonic() + 100
            while not os.path.exists(body[5:].decode()) and time.monotonic() < deadline:
                time.sleep(0.005)
        answers.append(body)
    return answers
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "paths", PATHS)
    archive(store, "paths", PATHS, version="2.0", file_name="paths2.mar")
    archive(store, "stream", STREAM)
    archive(store, "broken", BROKEN_STREAM)
    archive(store, "gated", GATED)
    config = {
        "max_request_size": str(MAX_REQUEST),
        "max_response_size": str(MAX_REQUEST),
        "job_queue_size": "1000",
    }
    with ServerProcess(store=store, config=config, web_workers=2) as running:
        assert running.register("echo.mar", batch_size=8, max_batch_delay=5).status == 200
        for name in ("paths.mar", "paths2.mar", "stream.mar", "broken.mar", "gated.mar"):
            reply = running.register(name)
            assert reply.status == 200, reply.text
        yield running


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


# Paths


@pytest.mark.parametrize(
    ("path", "version", "url_path", "explain"),
    [
        ("/predictions/paths", "1.0", "", "False"),
        ("/predictions/paths/", "1.0", "", "False"),
        ("/predictions/paths/2.0", "2.0", "", "False"),
        ("/predictions/paths/2.0/a/b", "2.0", "a/b", "False"),
        ("/predictions/p%61ths?x=1", "1.0", "", "False"),
        ("/explanations/paths", "1.0", "", "True"),
        ("/explanations/paths/2.0", "2.0", "", "True"),
        ("/v1/models/paths:predict", "1.0", None, "False"),
        ("/v1/models/paths:explain", "1.0", None, "True"),
        ("/v2/models/paths/infer", "1.0", None, "False"),
        ("/v2/models/paths/explain", "1.0", None, "True"),
    ],
)
def test_paths(server: ServerProcess, path: str, version: str, url_path: str | None, explain: str) -> None:
    reply = server.request("inference", "POST", path, body=b"x")
    assert reply.status == 200, reply.text
    answer = reply.json()
    assert (answer["version"], answer["explain"], answer["keys"]) == (version, explain, ["body"])
    assert answer["url_path"] == url_path


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/invocations?model_name=paths&a=1", ["a", "body", "model_name"]),
        ("/models/paths/invoke?a=1", ["a", "body"]),
        ("/paths/predict?a=1", ["a", "body"]),
        ("/paths/2.0/predict?a=1", ["a", "body"]),
    ],
)
def test_paths_that_pass_the_query_on(server: ServerProcess, path: str, keys: list[str]) -> None:
    reply = server.request("inference", "POST", path, body=b"x")
    assert reply.status == 200, reply.text
    assert reply.json()["keys"] == keys


@pytest.mark.parametrize("path", ["/invocations?model_name=paths", "/models/paths/invoke", "/paths/predict"])
def test_paths_whose_handler_has_the_clients_headers_only(server: ServerProcess, path: str) -> None:
    sent: list[dict[str, str]] = [{}, {"explain": "True", "url_path": "a/b"}]
    for headers in sent:
        answer = server.request("inference", "POST", path, headers=headers, body=b"x").json()
        assert (answer["explain"], answer["url_path"]) == (headers.get("explain"), headers.get("url_path"))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "POST"])
def test_any_method_predicts(server: ServerProcess, method: str) -> None:
    reply = server.request("inference", method, "/predictions/echo", body=b"x")
    assert (reply.status, reply.body) == (200, b"x")


@pytest.mark.parametrize(
    ("path", "status", "kind", "message"),
    [
        ("/predictions/nope", 404, "ModelNotFoundException", "Model not found: nope"),
        (
            "/predictions/echo/9",
            404,
            "ModelVersionNotFoundException",
            "Model version: 9 does not exist for model: echo",
        ),
        ("/predictions", 404, "ResourceNotFoundException", None),
        ("/invocations", 400, "BadRequestException", "Parameter model_name is required."),
        ("/v1/models/paths", 404, "ResourceNotFoundException", None),
        ("/v2/models/paths", 404, "ResourceNotFoundException", None),
        ("/models/paths", 404, "ResourceNotFoundException", None),
    ],
)
def test_wrong_paths(server: ServerProcess, path: str, status: int, kind: str, message: str | None) -> None:
    reply = server.request("inference", "POST", path, body=b"x")
    assert (reply.status, reply.json()["type"]) == (status, kind)
    assert message is None or reply.json()["message"] == message


def test_ping(server: ServerProcess) -> None:
    for method in ("GET", "POST", "PUT"):
        reply = server.request("inference", method, "/ping/")
        assert (reply.status, reply.json()) == (200, {"status": "Healthy"})


# Connections


def test_keep_alive_carries_many_requests(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=30)
    ids = set()
    try:
        for number in range(50):
            body = b"%d" % number * (number + 1)
            reply = exchange(connection, "POST", "/predictions/echo", body=body)
            assert (reply.status, reply.body) == (200, body)
            assert reply.headers["connection"] == "keep-alive"
            ids.add(reply.headers["x-request-id"])
    finally:
        connection.close()
    assert len(ids) == 50


def test_prediction_has_an_empty_reason(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/echo", b"x"))
        line, headers, body = raw.read_answer()
    assert line == b"HTTP/1.1 200 "
    assert body == b"x"
    assert sorted(headers) == [
        "cache-control",
        "connection",
        "content-length",
        "expires",
        "pragma",
        "x-request-id",
    ]


def test_error_closes_the_connection(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/nope", b"x"))
        line, headers, _ = raw.read_answer()
        assert line.startswith(b"HTTP/1.1 404")
        assert headers["connection"] == "close"
        assert raw.at_end()


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    bodies = [b"number %d" % number for number in range(30)]
    with server.raw() as raw:
        raw.send(b"".join(post("/predictions/echo", body) for body in bodies))
        for body in bodies:
            line, _, answer = raw.read_answer()
            assert line.startswith(b"HTTP/1.1 200")
            assert answer == body


def test_pipelined_request_behind_a_large_body(server: ServerProcess) -> None:
    large = random.Random(1).randbytes(300_000)
    with server.raw() as raw:
        raw.send(post("/predictions/echo", large) + post("/predictions/echo", b"small") + post("/ping", b""))
        assert raw.read_answer()[2] == large
        assert raw.read_answer()[2] == b"small"
        assert raw.read_answer()[2] == b'{\n  "status": "Healthy"\n}\n'


def test_request_that_arrives_byte_by_byte(server: ServerProcess) -> None:
    with server.raw() as raw:
        for byte in post("/predictions/echo", b"slowly"):
            raw.send(bytes([byte]))
        assert raw.read_answer()[2] == b"slowly"


@pytest.mark.parametrize(("header", "wanted"), [((), "close"), (("Connection: keep-alive",), "keep-alive")])
def test_http_1_0(server: ServerProcess, header: tuple[str, ...], wanted: str) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/echo", b"old", *header, version="1.0"))
        line, headers, body = raw.read_answer()
        assert line.split()[1] == b"200"
        assert body == b"old"
        assert headers["connection"] == wanted
        if wanted == "close":
            assert raw.at_end()
        else:
            raw.send(post("/predictions/echo", b"again", *header, version="1.0"))
            assert raw.read_answer()[2] == b"again"


def test_client_that_asks_to_close(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/echo", b"x", "Connection: close"))
        _, headers, body = raw.read_answer()
        assert (headers["connection"], body) == ("close", b"x")
        assert raw.at_end()


def test_head_has_no_body(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(b"HEAD /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        line, _ = raw.read_head()
        assert line.startswith(b"HTTP/1.1 200")
        raw.send(post("/predictions/echo", b"next"))
        line, _, body = raw.read_answer()
        assert (line, body) == (b"HTTP/1.1 200 ", b"next")


# Bodies


@pytest.mark.parametrize("sizes", [[5], [1, 2, 3], [], [100_000, 1, 70_000], [1] * 500])
def test_chunked_upload(server: ServerProcess, sizes: list[int]) -> None:
    random_bytes = random.Random(2)
    chunks = [random_bytes.randbytes(size) for size in sizes]
    reply = server.request("inference", "POST", "/predictions/echo", chunks=chunks)
    assert reply.status == 200, reply.text
    assert reply.body == b"".join(chunks)


def test_chunked_upload_with_extension_and_trailer(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.send(b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nX-Trailer: t\r\n\r\n" + post("/predictions/echo", b"next"))
        assert raw.read_answer()[2] == b"abcde"
        assert raw.read_answer()[2] == b"next"


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_expect_100_continue(server: ServerProcess, size: int) -> None:
    body = random.Random(3).randbytes(size)
    head = post("/predictions/echo", body, "Expect: 100-continue")[:-size]
    with server.raw() as raw:
        raw.send(head)
        line, _ = raw.read_head()
        assert line.startswith(b"HTTP/1.1 100")
        raw.send(body)
        line, _, answer = raw.read_answer()
        assert line.startswith(b"HTTP/1.1 200")
        assert answer == body


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 4096, 65_536, 100_000, 1 << 20, 5 << 20, MAX_REQUEST])
def test_body_comes_back_whole(server: ServerProcess, size: int) -> None:
    body = random.Random(size).randbytes(size)
    reply = server.predict("echo", body)
    assert reply.status == 200, reply.text
    assert reply.headers["content-length"] == str(size)
    assert reply.body == body


def test_too_large_body_is_refused_before_it_is_read(server: ServerProcess) -> None:
    with server.raw() as raw:
        head = f"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_REQUEST + 1}\r\n\r\n"
        raw.send(head.encode())
        line, headers, body = raw.read_answer()
        assert line.split()[1] == b"413"
        assert (list(headers), body) == (["content-length"], b"")
    # The answer has no text: who looks for the reason finds it in the log.
    told = r"\[WARN \] .* a request body (of \d+ bytes|in chunks) is refused with 413: max_request_size is the limit"
    eventually(lambda: re.search(told, server.log()), within=10)


def test_client_that_sends_all_of_a_too_large_body_first_reads_the_refusal(server: ServerProcess) -> None:
    body = bytes(MAX_REQUEST + (8 << 20))
    with server.raw() as raw:
        raw.send(f"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        line, headers, answer = raw.read_answer()
    assert line.split()[1] == b"413"
    assert (list(headers), answer) == (["content-length"], b"")


def test_too_large_expecting_client_is_not_told_to_continue(server: ServerProcess) -> None:
    with server.raw() as raw:
        lines = ["POST /predictions/echo HTTP/1.1", "Host: x", "Content-Length: 99999999999"]
        raw.send("\r\n".join([*lines, "Expect: 100-continue", "", ""]).encode())
        assert raw.read_head()[0].split()[1] == b"413"


def test_too_large_chunked_body(server: ServerProcess) -> None:
    with server.raw() as raw:
        raw.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        sender = threading.Thread(target=_send_until_refused, args=(raw, chunk * 2, MAX_REQUEST >> 20))
        sender.start()
        assert raw.read_head()[0].split()[1] == b"413"
        sender.join(20)
    assert server.predict("echo", b"alive").body == b"alive"


def _send_until_refused(raw: RawConnection, data: bytes, times: int) -> None:
    try:
        for _ in range(times):
            raw.send(data)
    except OSError:
        return


# Many at once


def test_concurrent_clients_each_get_their_own_bytes(server: ServerProcess) -> None:
    failures: list[str] = []

    def run(seed: int) -> None:
        own = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
        try:
            for _ in range(40):
                body = own.randbytes(own.choice([8, 100, 2048, 2100, 60_000]))
                reply = exchange(connection, "POST", "/predictions/echo", body=body)
                if (reply.status, reply.body) != (200, body):
                    failures.append(f"client {seed}: {reply.status} {reply.body[:100]!r}")
        except OSError as error:
            failures.append(f"client {seed}: {error!r}")
        finally:
            connection.close()

    clients = [threading.Thread(target=run, args=(seed,)) for seed in range(16)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
    assert failures == []


def test_answer_that_a_slow_client_has_not_taken_stays_whole(server: ServerProcess) -> None:
    """The slot of an answer under way belongs to it until the last byte has left."""
    large = random.Random(4).randbytes(6 << 20)
    with server.raw() as slow:
        slow.send(post("/predictions/echo", large))
        assert slow.read_head()[0] == b"HTTP/1.1 200 "
        for number in range(60):
            body = random.Random(number).randbytes(100_000)
            assert server.predict("echo", body).body == body
        assert slow.read_exactly(len(large)) == large


def test_client_that_leaves_early_costs_nobody_else(server: ServerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    raw = server.raw()
    raw.send(post("/predictions/gated", f"wait:{gate}".encode()))
    leavers = []
    for _ in range(20):
        leaver = server.raw()
        leaver.send(post("/predictions/gated", b"nobody waits for this"))
        leavers.append(leaver)
    for leaver in leavers:
        leaver.close()
    gate.touch()
    try:
        assert raw.read_answer()[2] == f"wait:{gate}".encode()
    finally:
        raw.close()
    for number in range(20):
        assert server.predict("gated", b"%d" % number).body == b"%d" % number


def test_half_a_request_is_forgotten(server: ServerProcess) -> None:
    for _ in range(5):
        with server.raw() as raw:
            raw.send(post("/predictions/echo", bytes(200_000))[:100_000])
    assert server.predict("echo", b"still here").body == b"still here"


# Streams


def test_stream_arrives_chunk_by_chunk(server: ServerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    with server.raw() as raw:
        raw.send(post("/predictions/stream", str(gate).encode()))
        line, headers = raw.read_head()
        assert line.startswith(b"HTTP/1.1 200")
        assert headers["transfer-encoding"] == "chunked"
        assert headers["ts_stream_next"] == "true"
        assert "content-length" not in headers
        chunks = raw.read_chunks()
        for number in range(3):
            assert next(chunks) == b"part%d" % number
            (tmp_path / f"go{number}").touch()
        assert list(chunks) == [b"end"]
        raw.send(post("/predictions/echo", b"next"))
        assert raw.read_answer()[2] == b"next"


def test_stream_for_http_1_0_ends_with_the_connection(server: ServerProcess, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"go{number}").touch()
    with server.raw() as raw:
        raw.send(post("/predictions/stream", str(tmp_path / "go").encode(), version="1.0"))
        _, headers = raw.read_head()
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert raw.read_rest() == b"part0part1part2end"


def test_stream_that_has_failed_before_anybody_looked(server: ServerProcess, tmp_path: Path) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/broken", f"{tmp_path}/".encode()))
        eventually((tmp_path / "begun").exists, within=20, what="the handler's begin")
        web_workers = server.processes("web-worker")
        for process in web_workers:
            process.kill(signal.SIGSTOP)
        try:
            (tmp_path / "go").touch()
            failed = "ValueError: after the first part"
            eventually(lambda: failed in server.log("model_log.log"), within=20, what="the handler's end")
        finally:
            for process in web_workers:
                process.kill(signal.SIGCONT)
        line, headers = raw.read_head()
        assert line.startswith(b"HTTP/1.1 200")
        assert (headers["transfer-encoding"], headers["ts_stream_next"]) == ("chunked", "true")
        assert "content-length" not in headers and "content-type" not in headers
        assert raw.read_rest() == b"4\r\npart\r\n"  # and no last chunk
    assert server.predict("echo", b"next").body == b"next"


def test_client_that_leaves_a_stream(server: ServerProcess, tmp_path: Path) -> None:
    with server.raw() as raw:
        raw.send(post("/predictions/stream", str(tmp_path / "go").encode()))
        raw.read_head()
    for number in range(3):
        (tmp_path / f"go{number}").touch()
    eventually(
        lambda: server.predict("stream", str(tmp_path / "go")).body == b"part0part1part2end",
        within=30,
        what="the next stream",
    )
