"""Requests to S3: AWS's published examples of its signature, where credentials come from, and a whole download."""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from wsgi_ts.archive.download import DownloadRules, fetch_archive
from wsgi_ts.archive.entries import ArchiveLimits
from wsgi_ts.archive.s3 import Credentials, find_credentials, s3_headers, sign

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
KEY = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
HOST = "models.s3.eu-central-1.amazonaws.com"


def signature(headers: dict[str, str]) -> str:
    return headers["authorization"].rpartition("Signature=")[2]


@pytest.mark.parametrize(
    ("path", "more", "expected"),
    [
        ("/test.txt", {"Range": "bytes=0-9"}, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("/?lifecycle", {}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("/?max-keys=2&prefix=J", {}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_examples_of_the_s3_documentation(path: str, more: dict[str, str], expected: str) -> None:
    parts = urlsplit(f"https://examplebucket.s3.amazonaws.com{path}")
    now = datetime(2013, 5, 24, tzinfo=timezone.utc)
    assert signature(sign(parts, {"x-amz-content-sha256": EMPTY, **more}, KEY, "us-east-1", now)) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("b.s3.amazonaws.com", True),
        ("b.c.s3.eu-west-1.amazonaws.com", True),
        ("b.s3-us-gov-west-1.amazonaws.com", True),
        ("s3.cn-north-1.amazonaws.com.cn", True),
        ("s3.amazonaws.com.evil.org", False),
        ("evils3.amazonaws.com", False),
        ("s3.amazonaws.com.evil", False),
        ("amazonaws.com", False),
    ],
)
def test_addresses_of_s3(host: str, expected: bool) -> None:
    assert bool(s3_headers(urlsplit(f"http://{host}/k"), {}, sse_kms=True)) is expected


def test_where_credentials_come_from(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b%c\n"
        "[lasting]\naws_access_key_id=d\naws_secret_access_key=e\naws_session_token=f\n[half]\naws_access_key_id=x\n"
    )
    environ = {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    assert find_credentials(environ) == Credentials("a", "b%c")
    assert find_credentials({**environ, "AWS_PROFILE": "lasting"}) == Credentials("d", "e", "f")
    assert find_credentials({**environ, "AWS_PROFILE": "half"}) is None
    assert find_credentials({**environ, "AWS_PROFILE": "none"}) is None
    own = {"AWS_ACCESS_KEY_ID": "g", "AWS_SECRET_ACCESS_KEY": "h"}
    assert find_credentials({**environ, **own}) == Credentials("g", "h")
    file.write_text("no section")
    assert find_credentials(environ) is None
    assert find_credentials({"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}) is None
    assert "secret" not in repr(Credentials("id", "secret", "secret"))


#: A stand-in for botocore's session, with the credentials of a role.
BOTOCORE = """
from collections import namedtuple

Frozen = namedtuple("Frozen", "access_key secret_key token")
role = Frozen("ASIA", "role secret", "role token")

class Credentials:
    def get_frozen_credentials(self):
        if isinstance(role, Exception):
            raise role
        return role

class Session:
    def get_credentials(self):
        return role and Credentials()

get_session = Session
"""


@pytest.fixture(autouse=True)
def without_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)


def test_credentials_of_a_role_by_botocore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "botocore").mkdir()
    (tmp_path / "botocore" / "__init__.py").touch()
    (tmp_path / "botocore" / "session.py").write_text(BOTOCORE)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("botocore", "botocore.session"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    environ = {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    assert find_credentials(environ) == Credentials("ASIA", "role secret", "role token")
    signed = s3_headers(urlsplit("https://b.s3.amazonaws.com/m.mar"), environ, sse_kms=False)
    assert signed["x-amz-security-token"] == "role token"
    assert "Credential=ASIA/" in signed["authorization"]
    own = {"AWS_ACCESS_KEY_ID": "g", "AWS_SECRET_ACCESS_KEY": "h"}
    assert find_credentials(environ | own) == Credentials("g", "h")
    session = sys.modules["botocore.session"]
    monkeypatch.setattr(session, "role", None)
    assert find_credentials(environ) is None
    monkeypatch.setattr(session, "role", RuntimeError("the SSO session has expired"))
    assert find_credentials(environ) is None
    assert "requests to S3 go unsigned: the SSO session has expired" in caplog.text


def test_secrets_stay_at_home() -> None:
    environ = {"AWS_ACCESS_KEY_ID": "g", "AWS_SECRET_ACCESS_KEY": "h", "AWS_SESSION_TOKEN": "i"}
    assert s3_headers(urlsplit("https://example.org/m.mar"), environ, sse_kms=True) == {}
    assert s3_headers(urlsplit("http://b.s3.amazonaws.com/m.mar"), environ, sse_kms=False) == {}
    signed = s3_headers(urlsplit("https://b.s3.amazonaws.com/m.mar"), environ, sse_kms=False)
    assert signed["x-amz-security-token"] == "i"
    assert "/us-east-1/s3/aws4_request" in signed["authorization"]


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k&X-Amz-Date=d&X-Amz-SignedHeaders=host&X-Amz-Signature=f",
        "AWSAccessKeyId=k&Signature=f%3D&Expires=1",
        # What is left of one in `POST /models?url=…` without %26: as it is, and not as another's.
        "X-Amz-Algorithm=AWS4-HMAC-SHA256",
    ],
)
@pytest.mark.parametrize("sse_kms", [False, True])
def test_a_presigned_url_is_not_signed_again(query: str, sse_kms: bool) -> None:
    environ = {"AWS_ACCESS_KEY_ID": "g", "AWS_SECRET_ACCESS_KEY": "h"}
    assert s3_headers(urlsplit(f"https://b.s3.amazonaws.com/m.mar?{query}"), environ, sse_kms=sse_kms) == {}
    other = s3_headers(urlsplit("https://b.s3.amazonaws.com/m.mar?versionId=signature"), environ, sse_kms=sse_kms)
    assert "authorization" in other


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A TLS server that everything takes for S3: its address, and the headers of each request."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()} | {":path": self.path})
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    certificate = make_certificate(tmp_path, HOST)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    port = server.server_address[1]
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", port))])
    yield f"https://{HOST}:{port}", seen
    server.shutdown()
    server.server_close()


def make_certificate(folder: Path, host: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "server.pem"
    file.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return file


def test_an_archive_is_fetched_with_a_signature(
    s3: tuple[str, list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, seen = s3
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    rules = DownloadRules(s3_sse_kms=True)
    target = fetch_archive(f"{address}/folder/m%20x.mar", tmp_path, rules, ArchiveLimits())
    assert target.read_bytes() == b"data"
    (headers,) = seen
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert "/eu-central-1/s3/aws4_request" in headers["authorization"]
    # What was sent is what was signed.
    stamp = datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    sent = {name: headers[name] for name in ("x-amz-server-side-encryption", "x-amz-content-sha256")}
    parts = urlsplit(f"https://{headers['host']}{headers[':path']}")
    again = sign(parts, sent, Credentials("AKID", "secret"), "eu-central-1", stamp)
    assert headers["authorization"] == again["authorization"]
