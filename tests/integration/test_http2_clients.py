"""Clients that speak HTTP/2 to the ports of HTTP/1.1: refused in their own protocol, never left to guess or to wait."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from typing import Any

import grpc
import pytest
from corpus.requests import with_length
from support.answers import parse_answers
from support.eventually import eventually
from support.http2 import Answer, Http2Client, split
from support.server import ServerProcess

from wsgi_ts.http2.frames import PREFACE, FrameType, settings_frame

APIS = ("inference", "management", "metrics")
PING = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"


@pytest.fixture
def server(echo_server: Any) -> ServerProcess:
    running: ServerProcess = echo_server
    return running


async def ask(port: int, path: str, *body: bytes) -> tuple[Answer, Http2Client]:
    client = await Http2Client.to(port)
    answer = await client.answer(client.ask(path, *body))
    while await client.read():  # until the server closes
        pass
    await client.close()
    return answer, client


@pytest.mark.parametrize("api", APIS)
def test_the_first_request_is_answered_and_the_connection_closed(server: ServerProcess, api: str) -> None:
    answer, client = asyncio.run(ask(server.ports[api], "/predictions/echo", b"body"))
    assert (answer.fields[":status"], answer.fields["content-type"]) == ("505", "application/json")
    told = json.loads(answer.body)
    assert (told["code"], told["type"]) == (505, "HttpVersionNotSupportedException")
    assert "HTTP/1.1 is spoken here" in told["message"]
    assert client.goaway == 0, "another code than NO_ERROR ends the process of a client that uses grpcio"
    assert len(answer.fields["x-request-id"]) == 36


def test_it_is_logged_once_for_each_web_worker(server: ServerProcess) -> None:
    workers = len(server.processes("web-worker"))
    for _ in range(8 * workers):
        asyncio.run(ask(server.ports["inference"], "/predictions/echo"))
    pattern = r"\[WARN \] .*speaks HTTP/2 to a port of HTTP/1\.1 and is answered 505"
    eventually(lambda: re.search(pattern, server.log()), within=5, what="the warning in the log")
    assert len(re.findall(pattern, server.log())) <= workers + len(server.processes("management-worker"))
    eventually(lambda: re.search(r'"- - -" 505 \d+', server.log("access_log.log")), within=10)


def test_the_preface_in_two_pieces_at_every_byte(server: ServerProcess) -> None:
    opening = PREFACE + settings_frame(())
    for at in range(1, len(opening)):
        with socket.create_connection(("127.0.0.1", server.ports["inference"]), timeout=60) as sock:
            sock.sendall(opening[:at])
            sock.sendall(opening[at:])
            data = b""
            while len(split(data)[0]) < 2:
                more = sock.recv(4096)
                assert more, f"cut at {at}: closed"
                data += more
            assert split(data)[0][0][0] == FrameType.SETTINGS, f"cut at {at}"


def test_behind_a_request_of_http_1_1_it_is_no_request(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.ports["inference"]), timeout=60) as sock:
        sock.sendall(with_length(b"good"))
        received = sock.recv(65536)
        sock.sendall(PREFACE)
        while data := sock.recv(65536):
            received += data
    assert [answer.status for answer in parse_answers(received)] == [200, 400]


def test_who_sends_no_request_is_not_waited_for(server: ServerProcess) -> None:
    """As others that send no request: for ten seconds."""
    with socket.create_connection(("127.0.0.1", server.ports["inference"]), timeout=60) as sock:
        sock.sendall(PREFACE + settings_frame(()))
        while sock.recv(4096):
            pass
    assert server.predict("echo", b"others").body == b"others"


def test_grpc_s_client_fails_at_once(server: ServerProcess) -> None:
    """It neither waits for its deadline nor ends its process."""
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['inference']}") as channel:
        call = channel.unary_unary(PING)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    assert "505" in caught.value.details()
    with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc_inference']}") as channel:
        assert b"Healthy" in channel.unary_unary(PING)(b"", timeout=60)


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, text=True, check=False)


def speaks_http_2() -> bool:
    return shutil.which("curl") is not None and "HTTP2" in curl("--version").stdout


@pytest.mark.skipif(not speaks_http_2(), reason="needs a curl that speaks HTTP/2")
def test_curl(server: ServerProcess) -> None:
    """With prior knowledge it is told; where it only offers to change to h2c it is answered as it asks."""
    url = f"http://127.0.0.1:{server.ports['inference']}/predictions/echo"
    shown = ("-w", " %{http_version} %{http_code}", "-H", "content-type: application/octet-stream")
    known = curl("--http2-prior-knowledge", *shown, "-d", "hello", url)
    assert (known.returncode, known.stdout[-6:]) == (0, " 2 505")
    assert "HTTP/1.1 is spoken here" in known.stdout
    head = curl("--http2-prior-knowledge", "--head", *shown, url)
    assert (head.returncode, head.stdout[-6:]) == (0, " 2 505")
    offered = curl("--http2", *shown, "-d", "hello", url)
    assert (offered.returncode, offered.stdout) == (0, "hello 1.1 200")
