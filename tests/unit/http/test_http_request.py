"""Request heads and chunked bodies, as bytes."""

from __future__ import annotations

import pytest

from wsgi_ts.http.body import ChunkedBody
from wsgi_ts.http.head import BadHead, parse_head

GOOD = b"POST /predictions/m?x=1 HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\n"
CHUNKED = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_head_says_what_the_server_needs() -> None:
    head = parse_head(GOOD)
    assert (head.method, head.path, head.query) == ("POST", "/predictions/m", "x=1")
    assert (head.content_length, head.content_type, head.chunked) == (3, b"text/plain", False)
    assert head.keep_alive and head.http_1_1
    assert head.environ["CONTENT_TYPE"] == "text/plain"
    assert head.environ["HTTP_HOST"] == "a"


def test_paths_are_decoded_once_and_may_be_absolute() -> None:
    assert parse_head(b"GET /a%252e%2F HTTP/1.1\r\n\r\n").path == "/a%2e/"
    assert parse_head(b"GET http://h:1/a/b?c HTTP/1.1\r\n\r\n").path == "/a/b"
    assert parse_head(b"GET http://h HTTP/1.1\r\n\r\n").path == "/"


def test_http_1_0_closes_unless_it_asks_not_to() -> None:
    assert not parse_head(b"GET / HTTP/1.0\r\n\r\n").keep_alive
    assert parse_head(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive


def test_a_client_may_ask_to_close() -> None:
    assert not parse_head(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").keep_alive
    assert not parse_head(b"GET / HTTP/1.1\r\nConnection: TE, Close\r\nTE: trailers\r\n\r\n").keep_alive


def test_a_header_with_an_underscore_does_not_pass_for_another() -> None:
    environ = parse_head(b"GET / HTTP/1.1\r\nX_Forwarded_For: evil\r\n\r\n").environ
    assert not [key for key in environ if "FORWARDED" in key]


def test_a_name_with_an_underscore_is_no_framing() -> None:
    lines = b"Content-Length: 3\r\nContent_Length: 0\r\nTransfer_Encoding: chunked"
    head = parse_head(b"POST / HTTP/1.1\r\n" + lines + b"\r\n\r\n")
    assert (head.content_length, head.chunked) == (3, False)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: +1", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 0x10", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: xchunked", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: identity", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked", 501),
        (b"GET / HTTP/1.1\r\nA : b", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n c: d", 400),
        (b"GET / HTTP/1.1\r\nA: b\0c", 400),
        (b"GET / HTTP/1.1\r\nA: b\rc", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", 400),
        (b"GET / HTTP/1.1\r\nContent-Type: a/b\r\nContent-Type: c/d", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"DESCRIBE / RTSP/1.0", 400),
        (b"get / HTTP/1.1", 400),
        (b"GET /\xff HTTP/1.1", 400),
        (b"GET / HTTP/2.0", 400),
        (b"PRI * HTTP/2.0", 400),
        (b"GET / HTTP/1.1\r\nExpect: the worst", 417),
        (b"GET / HTTP/1.1" + b"\r\nA: b" * 101, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 20000, 431),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1", 414),
    ],
)
def test_refused_heads(lines: bytes, status: int) -> None:
    with pytest.raises(BadHead) as raised:
        parse_head(lines + b"\r\n\r\n")
    assert raised.value.status == status


BODY = b"3\r\nabc\r\n5;ext=1\r\n0\r\nde\r\n1\r\n\n\r\n0\r\nTrailer: x\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("cut", range(len(BODY + NEXT) + 1))
def test_a_chunked_body_cut_anywhere(cut: int) -> None:
    chunked = ChunkedBody(100)
    data = BODY + NEXT
    rest = b""
    for part in (data[:cut], data[cut:]):
        if chunked.complete:
            rest += part
        elif part:
            chunked.feed(part)
            rest += chunked.rest
    assert chunked.complete
    assert bytes(chunked.data) == b"abc0\r\nde\n"
    assert rest == NEXT


def test_a_chunked_body_byte_by_byte() -> None:
    chunked = ChunkedBody(100)
    for byte in BODY:
        assert not chunked.complete
        chunked.feed(bytes([byte]))
    assert chunked.complete
    assert bytes(chunked.data) == b"abc0\r\nde\n"


def test_a_chunked_body_over_the_limit_is_not_kept() -> None:
    chunked = ChunkedBody(4)
    chunked.feed(b"5\r\nabcde\r\n")
    assert chunked.too_large
    assert len(chunked.data) <= 4


BROKEN = [b"x\r\n", b"-1\r\n", b"3\r\nabcd\r\n", b"0x1\r\na\r\n", b"1\na\r\n", b"ffffffffffffffffff\r\n"]


@pytest.mark.parametrize("data", BROKEN)
def test_broken_chunks(data: bytes) -> None:
    chunked = ChunkedBody(100)
    with pytest.raises(BadHead):
        chunked.feed(data + b"0\r\n\r\n")


def test_a_million_tiny_chunks_are_refused_before_they_cost_memory() -> None:
    chunked = ChunkedBody(10_000_000)
    with pytest.raises(BadHead, match="more framing than content"):
        for _ in range(1000):
            chunked.feed(b"1\r\na\r\n" * 1000)
