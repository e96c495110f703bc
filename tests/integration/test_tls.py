"""TLS against running servers: the answers of plain HTTP, and a start that explains what is wrong."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import http as ours
from support.archives import archive
from support.authority import Authority
from support.server import ServerProcess

#: Sends its second chunk when the file is there that the body names, if it names one.
STREAM = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    gate = bytes(data[0]["body"])
    for number in range(5):
        ends_at = time.monotonic() + 100
        while number and gate.startswith(b"/") and not os.path.exists(gate) and time.monotonic() < ends_at:
            time.sleep(0.005)
        send_intermediate_predict_response(
            ["chunk %d;" % number] * len(data), context.request_ids, "ok", 200, context
        )
    return ["end"] * len(data)
"""
LIMIT = 6553500


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    archive(path, "echo")
    archive(path, "stream", STREAM)
    return path


@pytest.fixture(scope="module")
def tls(store: Path, authority: Authority) -> Iterator[ServerProcess]:
    """Everything over TLS, from PEM files with a traditional RSA key."""
    client = authority.client()
    config = authority.pem(traditional=True)
    everywhere = dict.fromkeys(("inference", "management", "metrics"), client)
    with ServerProcess(store=store, config=config, tls=everywhere) as s:
        for name in ("echo.mar", "stream.mar"):
            assert s.register(name).status == 200
        yield s


@pytest.fixture(scope="module")
def mixed(store: Path, authority: Authority) -> Iterator[ServerProcess]:
    """Predictions in plain HTTP; management over TLS, from a key store."""
    config = {"keystore": str(authority.keystore("secret word")), "keystore_pass": "secret word"}
    with ServerProcess(store=store, config=config, tls={"management": authority.client()}) as s:
        for name in ("echo.mar", "stream.mar"):
            assert s.register(name).status == 200
        yield s


# The same answers


@pytest.mark.parametrize(
    ("api", "method", "path", "body"),
    [
        ("inference", "POST", "/predictions/echo", b"hello"),
        ("inference", "POST", "/predictions/echo", b"x" * 300_000),
        ("inference", "POST", "/predictions/echo/1.0", b""),
        ("inference", "POST", "/predictions/unknown", b"x"),
        ("inference", "GET", "/ping", None),
        ("inference", "HEAD", "/ping", None),
        ("inference", "GET", "/nothing", None),
        ("inference", "POST", "/predictions/stream", b"x"),
        ("metrics", "GET", "/metrics", None),
    ],
)
def test_answers_are_those_of_plain_http(
    tls: ServerProcess, mixed: ServerProcess, api: str, method: str, path: str, body: bytes | None
) -> None:
    over_tls, plain = (server.request(api, method, path, body=body) for server in (tls, mixed))
    assert over_tls.status == plain.status
    assert over_tls.reason == plain.reason
    assert over_tls.body == plain.body
    assert list(over_tls.headers) == list(plain.headers)
    varying = {"x-request-id"}
    assert {k: v for k, v in over_tls.headers.items() if k not in varying} == {
        k: v for k, v in plain.headers.items() if k not in varying
    }
    assert not {"server", "date"} & set(over_tls.headers)


def test_a_body_too_large_is_refused_before_it_is_sent(tls: ServerProcess, mixed: ServerProcess) -> None:
    answers = []
    for server in (tls, mixed):
        with server.raw() as raw:
            raw.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (LIMIT + 1))
            answers.append(raw.read_answer())
    assert answers[0] == answers[1]
    assert answers[0][0].split()[1] == b"413"


def test_management_over_tls_from_a_key_store(mixed: ServerProcess, tls: ServerProcess) -> None:
    for server in (mixed, tls):
        described = server.request("management", "GET", "/models/echo").json()[0]
        assert described["modelName"] == "echo"
    assert mixed.predict("echo", b"plain").body == b"plain"


def test_the_largest_body_goes_both_ways(tls: ServerProcess) -> None:
    body = bytes(range(256)) * (LIMIT // 256)
    assert tls.predict("echo", body).body == body


def test_many_requests_on_one_connection_and_many_connections(tls: ServerProcess) -> None:
    def client(number: int) -> None:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", tls.ports["inference"], timeout=30, context=tls.tls["inference"]
        )
        for turn in range(20):
            body = f"{number} {turn} ".encode() * (1 + 4000 * (turn % 3))
            assert ours.exchange(connection, "POST", "/predictions/echo", body=body).body == body
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


@pytest.mark.parametrize("size", [10, 5000, 100_000])
def test_requests_sent_behind_each_other_keep_their_order(tls: ServerProcess, size: int) -> None:
    """A large body is received straight into its slot; the next head may be in the same TLS record."""
    bodies = [b"%d;" % number * size for number in range(4)]
    with tls.raw() as raw:
        raw.send(
            b"".join(
                b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                for body in bodies[:2]
            )
        )
        for body in bodies[:2]:
            assert raw.read_answer()[2] == body


def test_a_reader_slower_than_the_server_gets_everything(tls: ServerProcess) -> None:
    body = b"0123456789abcdef" * 400_000  # more than the kernel keeps for a connection
    with tls.raw() as raw:
        raw.send(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
        raw.send(body)
        _, headers = raw.read_head()
        time.sleep(0.3)
        assert raw.read_exactly(int(headers["content-length"])) == body
        raw.send(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.read_answer()[0].split()[1] == b"200"


def test_a_stream_comes_in_chunks(tls: ServerProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with tls.raw() as raw:
        body = str(gate).encode()
        raw.send(b"POST /predictions/stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        _, headers = raw.read_head()
        assert headers["transfer-encoding"] == "chunked"
        chunks = raw.read_chunks()
        assert next(chunks) == b"chunk 0;"
        gate.touch()
        assert b"".join(chunks) == b"chunk 1;chunk 2;chunk 3;chunk 4;end"


def test_an_error_ends_the_connection_in_the_protocol_too(tls: ServerProcess) -> None:
    with tls.raw() as raw:
        raw.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.read_answer()[0].split()[1] == b"404"
        # A connection that was just cut off raises SSLEOFError here.
        assert raw.read_rest() == b""


# What is not TLS, or not the right one


def test_plain_http_is_answered_403(tls: ServerProcess) -> None:
    for api in ("inference", "management", "metrics"):
        reply = ours.request(tls.ports[api], "GET", "/ping")
        assert reply.status == 403
        assert reply.json() == {"status": "This TorchServe instance only accepts HTTPS requests"}
        assert reply.headers["connection"] == "close"
        assert reply.headers["content-type"] == "application/json"
    body = b"x" * 100_000
    assert ours.request(tls.ports["inference"], "POST", "/predictions/echo", body=body).status == 403


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 64, b"\x16\x03\x01\xff\xff" + b"x" * 300, b"\x16\x03\x01\x00\x05hello", b"\x80" * 20, b"\x16"],
    ids=["zeroes", "too long", "no hello", "old", "short"],
)
def test_garbage_harms_nobody(tls: ServerProcess, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tls.ports["inference"]), timeout=30) as sock:
        sock.sendall(garbage)
        # A server that has read it by now has closed the connection.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                continue
    assert tls.predict("echo", b"next").body == b"next"


def test_a_client_that_resets_during_the_handshake_harms_nobody(tls: ServerProcess) -> None:
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", tls.ports["inference"]), timeout=30)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    assert tls.predict("echo", b"next").body == b"next"


@pytest.mark.slow
def test_a_handshake_that_stalls_is_closed(tls: ServerProcess) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", tls.ports["inference"]), timeout=60) as sock:
        sock.sendall(b"\x16\x03\x01\x00")
        assert sock.recv(100) == b""
    # The limit is 10 s.
    assert time.monotonic() - started > 5


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(
    ("newest", "cipher", "accepted"),
    [
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", False),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-GCM-SHA256", True),
        (ssl.TLSVersion.TLSv1_2, "AES128-SHA", False),
        (ssl.TLSVersion.TLSv1_3, None, True),
    ],
)
def test_versions_and_ciphers(
    tls: ServerProcess, authority: Authority, newest: ssl.TLSVersion, cipher: str | None, accepted: bool
) -> None:
    context = authority.client()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = newest
    if cipher is not None:
        context.set_ciphers(cipher)
    with socket.create_connection(("127.0.0.1", tls.ports["inference"]), timeout=30) as sock:
        if accepted:
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped:
                assert wrapped.version() == {ssl.TLSVersion.TLSv1_2: "TLSv1.2"}.get(newest, "TLSv1.3")
        else:
            with pytest.raises(OSError):
                context.wrap_socket(sock, server_hostname="127.0.0.1")


# Keys and certificates


def test_the_key_is_on_no_disk_but_where_the_user_put_it(mixed: ServerProcess) -> None:
    found = []
    for folder in (mixed.run_dir, mixed.home / "logs", mixed.home / "tmp"):
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"PRIVATE KEY" not in content and b"secret word" not in content, path
                found.append(path.name)
    assert "config.json" in found
    for process in mixed.processes("model-worker"):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            assert "memfd:wsgi-ts-tls" not in str(link.readlink())


def test_without_files_the_certificate_is_made_at_the_start(store: Path) -> None:
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    with ServerProcess(store=store, tls={"inference": unchecked, "management": unchecked}) as server:
        assert server.register("echo.mar").status == 200
        assert server.predict("echo", b"x").body == b"x"
        assert "TLS with a self-signed certificate" in server.log()
        shown = [ssl.get_server_certificate(("127.0.0.1", server.ports[api])) for api in ("inference", "management")]
        assert shown[0] == shown[1]
        trusting = ssl.create_default_context(cadata=shown[0])
        reply = ours.request(server.ports["inference"], "GET", "/ping", tls=trusting)
        assert reply.status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            ours.request(server.ports["inference"], "GET", "/ping", tls=ssl.create_default_context())


def start_failure(config: dict[str, str]) -> str:
    """Starts a server with TLS that must not start; returns what it printed."""
    with pytest.raises(RuntimeError, match="the server ended with 1") as caught:
        ServerProcess(config=config, tls={"inference": ssl.create_default_context()}).__enter__()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_a_pair_that_does_not_match_stops_the_start(authority: Authority) -> None:
    one, other = authority.pem("one"), authority.pem("other")
    said = start_failure({**one, "private_key_file": other["private_key_file"]})
    assert f"certificate_file {one['certificate_file']}: the private key does not belong to" in said


def test_a_key_too_small_for_a_level_stops_the_start(authority: Authority) -> None:
    small = authority.pem("small", bits=1024)
    where, _, said = start_failure({**small, "tls_security_level": "2"}).strip().splitlines()[-1].partition(": ")
    assert re.fullmatch(r".*/config\.properties:\d+", where)
    assert said == (
        f"certificate_file {small['certificate_file']}: its key (RSA, 1024 bits) is too small for OpenSSL's security "
        "level 2; renew the certificate with a larger key, or set tls_security_level=1 until then"
    )


def test_a_small_key_is_served_everywhere(authority: Authority) -> None:
    """Upstream's own checks use a key of 1024 bits: a deployment can move over first and renew its certificate then."""
    client = authority.client()
    client.set_ciphers("DEFAULT:@SECLEVEL=1")
    config = {**authority.pem("small", bits=1024), "enable_grpc_ssl": "true"}
    everywhere = dict.fromkeys(("inference", "management", "metrics"), client)
    with ServerProcess(config=config, tls=everywhere) as server:
        assert (
            "its key (RSA, 1024 bits) is too small for OpenSSL's security level 2 and is served with level 1"
            in server.log()
        )
        assert server.request("inference", "GET", "/ping").status == 200
        assert server.request("management", "GET", "/models").status == 200
        assert server.request("metrics", "GET", "/metrics").status == 200
        client.set_alpn_protocols(["h2"])
        for api in ("grpc_inference", "grpc_management"):
            plain = socket.create_connection(("127.0.0.1", server.ports[api]), timeout=30)
            with plain, client.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
                assert wrapped.selected_alpn_protocol() == "h2"


def test_an_expired_certificate_and_an_open_key_are_warned_of(authority: Authority, store: Path) -> None:
    config = authority.pem("expired", days=-1)
    Path(config["private_key_file"]).chmod(0o644)
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    with ServerProcess(config=config, tls={"inference": unchecked}) as server:
        assert "the certificate expired on" in server.log()
        assert f"chmod o= {config['private_key_file']}" in server.log()
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            ours.request(server.ports["inference"], "GET", "/ping", tls=authority.client())
