"""HTTP/1.1 request heads: from bytes to what the server needs to know, by httptools (llhttp, strict).

The body is not fed to this parser: the web worker receives it where it belongs (see `body`).
"""

from __future__ import annotations

import functools
import re
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools

from wsgi_ts.logs.text import safe_target

#: As TorchServe (Netty): 4096 bytes of request line, 8192 bytes of headers.
MAX_REQUEST_LINE = 4096
MAX_HEADER_BYTES = 8192
MAX_HEADERS = 100
_REMEMBERED_HEADS = 256
_LONGEST_REMEMBERED = 1024
_ABSOLUTE = re.compile(rb"(?i)https?://[^/?]*")
_BARE_LINE_FEED = re.compile(rb"[^\r]\n")


class BadHead(Exception):
    """The head is not one this server accepts.

    Args:
        status: 400, 414, 417, 431 or 501.
        message: for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head:
    """A parsed request head.

    Attributes:
        raw: the bytes, with the empty line.
        method, path, query: `path` is percent-decoded, as WSGI's PATH_INFO (latin-1 of the raw bytes).
        target: as in the request line; `line` is all of that, for a log.
        http_1_1: False for HTTP/1.0.
        keep_alive: the client wants to go on using the connection.
        content_length: the body's length, 0 for none.
        chunked: the body comes in chunks.
        expect_continue: the client waits for "100 Continue".
        content_type: as sent, empty for none.
        environ: the WSGI variables that follow from the head alone; copy before use.
        admitted: the mark of the check that let this head pass (`wsgi_ts.security.access`), None before.
        route, route_epoch: what the head means, for the routing table that found out, and its epoch then.
    """

    __slots__ = (
        *(
            "admitted",
            "chunked",
            "content_length",
            "content_type",
            "environ",
            "expect_continue",
            "http_1_1",
            "keep_alive",
        ),
        *("line", "method", "path", "query", "raw", "route", "route_epoch", "target"),
    )

    def __init__(self, raw: bytes) -> None:
        collector = _Collector()
        parser = httptools.HttpRequestParser(collector)
        try:
            parser.feed_data(raw)
        except httptools.HttpParserUpgrade:
            pass  # no protocol is offered to upgrade to; the request is answered as it stands
        except httptools.HttpParserError as error:
            raise BadHead(400, "Invalid HTTP message.") from error
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BadHead(400, "Invalid HTTP message.")
        self.raw = raw
        self.admitted: object = None
        self.route: Any = None
        self.route_epoch = -1
        self.http_1_1 = version == "1.1"
        self.method = parser.get_method().decode("latin-1")
        self.target = collector.url.decode("latin-1")
        self.line = f"{self.method} {safe_target(self.target)} HTTP/{version}"
        # Otherwise RTSP and the like, or more than one space.
        if not raw.startswith(f"{self.method} {self.target} HTTP/{version}\r\n".encode("latin-1")):
            raise BadHead(400, "Invalid HTTP message.")
        self._read_target(collector.url)
        self._read_headers(collector.headers)

    def _read_target(self, url: bytes) -> None:
        if not url.startswith(b"/"):
            url = _ABSOLUTE.sub(b"", url, count=1)
        path, _, query = url.partition(b"#")[0].partition(b"?")
        self.path = (unquote_to_bytes(path) if b"%" in path else path or b"/").decode("latin-1")
        self.query = query.decode("latin-1")

    def _read_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        if len(headers) > MAX_HEADERS:
            raise BadHead(431, "Too many headers.")
        self.content_length = 0
        self.chunked = False
        self.expect_continue = False
        self.content_type = b""
        environ: dict[str, Any] = {}
        for raw_name, raw_value in headers:
            if b"_" in raw_name:  # it would pass for another header, Content-Length included (as nginx does)
                continue
            name = raw_name.decode("latin-1").upper().replace("-", "_")
            value = raw_value.decode("latin-1").strip(" \t")
            if name == "CONTENT_LENGTH":
                self.content_length = int(value)
                environ[name] = value
            elif name == "CONTENT_TYPE":
                if name in environ:
                    raise BadHead(400, "More than one Content-Type header.")
                self.content_type = raw_value.strip(b" \t")
                environ[name] = value
            elif name == "TRANSFER_ENCODING":
                if value.lower() != "chunked" or not self.http_1_1 or self.chunked:
                    raise BadHead(501, "The only transfer coding this server knows is one chunked of HTTP/1.1.")
                self.chunked = True
            elif name == "EXPECT":
                if value.lower() != "100-continue":
                    raise BadHead(417, "The only expectation this server meets is 100-continue.")
                self.expect_continue = self.http_1_1
            else:
                key = "HTTP_" + name
                if name == "HOST" and key in environ:
                    raise BadHead(400, "More than one Host header.")
                environ[key] = f"{environ[key]},{value}" if key in environ else value
        self.keep_alive = _wants_keep_alive(environ.get("HTTP_CONNECTION", ""), self.http_1_1)
        environ["REQUEST_METHOD"] = self.method
        environ["PATH_INFO"] = self.path
        environ["QUERY_STRING"] = self.query
        environ["RAW_URI"] = self.target
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if self.http_1_1 else "HTTP/1.0"
        self.environ = environ


def _wants_keep_alive(connection: str, http_1_1: bool) -> bool:
    """Whether the client wants to go on using the connection (RFC 9112 9.3); no protocol is offered to upgrade to.

    The parser is not asked: it forgets the header when a request without a body is complete.
    """
    options = {option.strip().lower() for option in connection.split(",")}
    return "keep-alive" in options if not http_1_1 else not options & {"close", "upgrade"}


class _Collector:
    """httptools' callbacks."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))


@functools.lru_cache(maxsize=_REMEMBERED_HEADS)
def _remembered(raw: bytes) -> Head:
    return Head(raw)


def parse_head(raw: bytes) -> Head:
    """Parses a head that ends with its empty line. Short heads are remembered: a client's heads repeat.

    Raises:
        BadHead: with the status to answer.
    """
    if len(raw) <= _LONGEST_REMEMBERED:
        return _remembered(raw)
    _check_size(raw)
    return Head(raw)


def check_partial_head(raw: bytes) -> None:
    """Looks at the first bytes of a head: whether its end is worth waiting for.

    Raises:
        BadHead: with the status to answer.
    """
    if raw[:1].isspace() or b"\0" in raw or _BARE_LINE_FEED.search(raw):
        raise BadHead(400, "Invalid HTTP message.")
    _check_size(raw)


def _check_size(raw: bytes) -> None:
    line_end = raw.find(b"\r\n")
    if line_end > MAX_REQUEST_LINE or (line_end < 0 and len(raw) > MAX_REQUEST_LINE + 1):
        raise BadHead(414, "The request line is too long.")
    if line_end >= 0 and len(raw) > line_end + MAX_HEADER_BYTES + len(b"\r\n\r\n"):
        raise BadHead(431, "The request's headers are too large.")
