"""deploy/nginx.conf, in a real nginx in front of a real server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from corpus.requests import CASES, HIDDEN, Case, with_length
from lifecycle.pods import Service
from support import debian, http
from support.archives import archive
from support.authority import Authority
from support.eventually import eventually
from support.grpc_client import (
    health_pb2,
    health_pb2_grpc,
    inference_pb2_grpc,
    management_pb2,
    management_pb2_grpc,
    request,
)
from support.http import RawConnection, Reply
from support.nginx import CONFIGURATION, Nginx
from support.server import ServerProcess
from support.upgrades import upgrade

debian.needs("nginx")

#: Answers with its input, over HTTP and over gRPC.
ECHO = """
def handle(data, context):
    if data is None:
        return None
    return [row.get("body") or row.get("data") or b"" for row in data]
"""
#: Sends part after part; how far it is is told by the length of a file.
STREAM = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    for part in range(3):
        send_intermediate_predict_response([f"part {part}\\n"], context.request_ids, "", 200, context)
        while os.path.getsize(os.environ["STEPS"]) <= part:
            time.sleep(0.01)
    return ["end"]
"""
#: Answers with the sum of its input, and notes each call.
SUM = """
import hashlib, os

def handle(data, context):
    if data is None:
        return None
    with open(os.environ["CALLS"], "a") as calls:
        calls.write("x" * len(data))
    return [hashlib.sha256(bytes(row["body"])).hexdigest() for row in data]
"""
#: Notes the call, and dies of it.
DYING = """
import os

def handle(data, context):
    if data is None:
        return None
    with open(os.environ["CALLS"], "a") as calls:
        calls.write("x" * len(data))
    os.kill(int(open(os.environ["VICTIM"]).read()), 9)
    import time; time.sleep(5)
    return [b""] * len(data)
"""
UPLOAD_BYTES = 100 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for nginx, the certificates, and what handlers note."""
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    for name, source in {"stream": STREAM, "sum": SUM, "dying": DYING}.items():
        archive(store, name, source)
    archive(store, "echo", ECHO)
    config = {"max_request_size": str(128 << 20), "job_queue_size": "1000"}
    environment = {name: os.fspath(files / name.lower()) for name in ("CALLS", "STEPS", "VICTIM")}
    with ServerProcess(store=store, config=config, environment=environment) as running:
        for name in ("stream", "sum", "dying", "echo"):
            assert running.register(f"{name}.mar").status == 200
        yield running


@pytest.fixture(scope="module")
def authority(files: Path) -> Authority:
    return Authority(files)


@pytest.fixture(scope="module")
def front(server: ServerProcess, files: Path, authority: Authority) -> Iterator[Nginx]:
    with Nginx(files, server, authority, {"client_max_body_size 8m": "client_max_body_size 128m"}) as running:
        yield running


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.client()


@pytest.fixture(scope="module")
def channel(front: Nginx, files: Path) -> Iterator[grpc.Channel]:
    with channel_to(front, files) as channel:
        yield channel


def channel_to(front: Nginx, files: Path) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials((files / "ca.pem").read_bytes())
    return grpc.secure_channel(f"localhost:{front.port}", credentials, [("grpc.enable_http_proxy", 0)])


def ask(front: Nginx, tls: ssl.SSLContext, path: str, body: bytes = b"", method: str = "POST", **kwargs: Any) -> Reply:
    headers = {"content-type": "application/octet-stream"}
    return http.request(front.port, method, path, headers=headers, body=body, tls=tls, **kwargs)


def test_the_file_has_no_mistake_and_names_the_inference_api_alone(front: Nginx) -> None:
    checked = subprocess.run([*front.command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
    text = "\n".join(line.partition("#")[0] for line in CONFIGURATION.read_text().splitlines())
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", text)) == {"8080", "7070"}
    for directive in (
        "client_header_timeout",
        "client_body_timeout",
        "client_max_body_size 8m",
        "proxy_request_buffering on",
        "underscores_in_headers off",
        "proxy_hide_header Server",
        "ssl_protocols TLSv1.2 TLSv1.3",
        "proxy_next_upstream off",
        "grpc_next_upstream off",
        "grpc_read_timeout 1h",
        "grpc_send_timeout 1h",
    ):
        assert directive in text, directive
    assert 8 * 2**20 >= 6553500


def test_predictions_probes_and_errors_pass_as_they_are(
    front: Nginx, tls: ssl.SSLContext, server: ServerProcess
) -> None:
    reply = ask(front, tls, "/predictions/echo", b"hello")
    assert (reply.status, reply.body) == (200, b"hello")
    assert ask(front, tls, "/readyz", method="GET").status == 200
    assert ask(front, tls, "/predictions/none").json() == server.predict("none").json()
    assert ask(front, tls, "/models", method="GET").status == 404, "the management API is not there"


def test_plain_http_is_sent_on_to_tls(front: Nginx) -> None:
    reply = http.request(front.plain_port, "POST", "/predictions/echo?a=b", body=b"x")
    assert (reply.status, reply.headers.get("location")) == (308, "https://127.0.0.1/predictions/echo?a=b")


def test_connections_to_the_server_are_used_again(front: Nginx, tls: ssl.SSLContext, server: ServerProcess) -> None:
    def peers() -> set[str]:
        lines = [line for line in server.log("access_log.log").splitlines() if "keepalive-probe" in line]
        return {line.split(" - /")[-1].split(" ")[0] for line in lines}

    for _ in range(5):
        assert ask(front, tls, "/predictions/echo?keepalive-probe", b"1").status == 200
    lines = eventually(lambda: server.log("access_log.log").count("keepalive-probe") == 5 and peers(), within=20)
    assert len(lines) == 1, lines


def test_a_stream_is_passed_on_part_by_part(front: Nginx, tls: ssl.SSLContext, files: Path) -> None:
    steps = files / "steps"
    steps.write_bytes(b"")
    with RawConnection(front.port, tls=tls) as connection:
        connection.send(b"POST /predictions/stream HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        _, headers = connection.read_head()
        assert headers["transfer-encoding"] == "chunked"
        chunks = connection.read_chunks()
        for part in range(3):
            # The handler does not go on before this part has come through.
            assert next(chunks) == b"part %d\n" % part
            steps.write_bytes(b"x" * (part + 1))
        assert next(chunks) == b"end"


@pytest.mark.parametrize("way", ["length", "chunked"])
def test_an_upload_of_100_mb_is_not_written_to_a_disk(
    front: Nginx, tls: ssl.SSLContext, server: ServerProcess, way: str
) -> None:
    """It goes on as it comes, with a length or without."""
    piece = os.urandom(1 << 20)
    pieces = UPLOAD_BYTES // len(piece)
    # nginx warns of it; the file itself has no name any more when somebody could look.
    written = front.log("error.log").count("buffered to a temporary file")
    if way == "length":
        reply = ask(front, tls, "/predictions/sum", piece * pieces, timeout=120)
    else:
        reply = http.request(front.port, "POST", "/predictions/sum", chunks=[piece] * pieces, tls=tls, timeout=120)
    assert reply.text == hashlib.sha256(piece * pieces).hexdigest()
    assert front.log("error.log").count("buffered to a temporary file") == written


def test_a_body_too_large_is_refused_before_it_is_read(front: Nginx, tls: ssl.SSLContext) -> None:
    with RawConnection(front.port, tls=tls) as connection:
        connection.send(b"POST /predictions/sum HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n")
        assert connection.read_head()[0].startswith(b"HTTP/1.1 413 ")


def test_grpc_passes_but_not_the_management_api(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == 1
    inference = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
    assert inference.Predictions(request("echo", b"1"), timeout=60).prediction == b"1"
    management = management_pb2_grpc.ManagementAPIsServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        management.ListModels(management_pb2.ListModelsRequest(), timeout=60)
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN)


def test_what_a_grpc_stream_sends_comes_part_by_part(channel: grpc.Channel, files: Path) -> None:
    steps = files / "steps"
    steps.write_bytes(b"")
    inference = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
    parts = inference.StreamPredictions(request("stream", b""), timeout=100)
    for part in range(3):
        assert next(parts).prediction == b"part %d\n" % part
        steps.write_bytes(b"x" * (part + 1))
    assert next(parts).prediction == b"end"


def test_a_grpc_stream_is_as_large_and_as_silent_as_its_client_wants(
    server: ServerProcess, files: Path, authority: Authority, tmp_path: Path
) -> None:
    """What limits a body of HTTP does not limit a stream: here 1 MiB, and a second between two parts."""
    limits = {"client_max_body_size 8m": "client_max_body_size 1m", "client_body_timeout 30s": "client_body_timeout 1s"}
    said: queue.Queue[Any] = queue.Queue()
    with Nginx(tmp_path, server, authority, limits) as narrow, channel_to(narrow, files) as channel:
        inference = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        answers = inference.StreamPredictions2(iter(said.get, None), timeout=100)
        for number in range(3):
            data = bytes([number]) * 600_000
            said.put(request("echo", data, sequence_id="s"))
            assert next(answers).prediction == data
            time.sleep(1.5)
        said.put(None)
        assert list(answers) == []


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_no_prediction_is_sent_a_second_time(
    front: Nginx, tls: ssl.SSLContext, server: ServerProcess, files: Path, method: str
) -> None:
    """The connection breaks while the prediction runs: nginx says 502, and does not try it somewhere else."""
    calls = files / "calls"
    calls.write_bytes(b"")
    assert ask(front, tls, "/predictions/sum", b"", method).status == 200, "there is a connection to use again"
    (worker,) = server.processes("web-worker")
    (files / "victim").write_text(str(worker.pid))
    calls.write_bytes(b"")
    assert ask(front, tls, "/predictions/dying", b"", method).status == 502
    eventually(lambda: server.predict("echo", b"1").status == 200, within=20)
    assert calls.read_bytes() == b"x"


# Request smuggling

GOOD = with_length(b"good", "Connection: close")


def answers_to(front: Nginx, tls: ssl.SSLContext, data: bytes) -> bytes:
    """All that comes back on a connection, until nginx closes it or has nothing more to say."""
    with RawConnection(front.port, timeout=3.0, tls=tls) as connection:
        parts = []
        with contextlib.suppress(OSError):
            connection.send(data)
        with contextlib.suppress(OSError):
            while part := connection.sock.recv(65536):
                parts.append(part)
    return b"".join(parts)


def lines_of(server: ServerProcess) -> int:
    return server.log("access_log.log").count("\n")


def wait_for_both_logs(front: Nginx, tls: ssl.SSLContext, server: ServerProcess, word: str) -> None:
    """Until nginx and the server have written of all that was asked before: each of them does so in one process."""
    assert ask(front, tls, f"/predictions/echo?{word}").status == 200
    eventually(lambda: f"?{word}" in server.log("access_log.log") and f"?{word}" in front.log("access.log"), within=20)


def test_nginx_and_the_server_count_the_same_requests(front: Nginx, tls: ssl.SSLContext, server: ServerProcess) -> None:
    """Each raw request of the corpus, with a good one behind it: what is one for nginx is one for the server, too."""
    cases = [case for case in CASES if not case.unfinished and len(case.raw) <= 300_000]
    wait_for_both_logs(front, tls, server, "before")
    passed_before, seen_before = front.passed_on(), lines_of(server)
    for case in cases:
        received = answers_to(front, tls, case.raw + GOOD)
        assert received.count(b"HTTP/1.1 ") - received.count(b"HTTP/1.1 100 ") <= 2, (case.name, received)
    hidden = Case("", HIDDEN, frozenset(), frozenset())
    assert sum(hidden.raw in case.raw for case in cases) > 5, "some try to smuggle a request"

    # One that breaks off is passed on, but is no request for the server. Never may there be more than nginx knows of.
    wait_for_both_logs(front, tls, server, "after")
    assert lines_of(server) - seen_before > len(cases) // 2
    eventually(lambda: lines_of(server) - seen_before <= front.passed_on() - passed_before, within=20)


def test_an_upgrade_of_the_server_gives_no_client_a_502(
    front: Nginx, tls: ssl.SSLContext, server: ServerProcess
) -> None:
    with Service([front.port], "/predictions/echo", clients=6, tls=tls) as service:
        eventually(lambda: service.outcomes["ok"] > 100, within=30)
        done = upgrade(server)
        assert done.returncode == 0, done.stderr
        at_end = service.outcomes["ok"]
        eventually(lambda: service.outcomes["ok"] > at_end + 100, within=30)
    assert service.outcomes.keys() == {"ok"}, service.outcomes
