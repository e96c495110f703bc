"""HTTP/1.1 request heads: from bytes to what the server needs to know, by httptools (llhttp, strict).

The body is not fed to this parser: the web worker receives it where it belongs (see `body`).
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

import httptools

from wsgi_ts.logs.text import safe_target

#: As TorchServe (Netty): 4096 bytes of request line, 8192 bytes of headers.
MAX_REQUEST_LINE: Final = 4096
MAX_HEADER_BYTES: Final = 8192
MAX_HEADERS: Final = 100
_REMEMBERED_HEADS: Final = 256
_REMEMBERED_LINES: Final = 1024
_LONGEST_REMEMBERED: Final = 1024
_ABSOLUTE: Final = re.compile(rb"(?i)https?://[^/?]*")
_OF_TRACE: Final = frozenset((b"traceparent", b"tracestate"))
_READ_HERE: Final = _OF_TRACE | frozenset(
    (b"content-length", b"content-type", b"connection", b"expect", b"host", b"transfer-encoding")
)
_ONLY_ONCE: Final = {b"content-type": "Content-Type", b"host": "Host"}
_BARE_LINE_FEED: Final = re.compile(rb"[^\r]\n")


class BadHead(Exception):
    """The head is not one this server accepts.

    Args:
        status: 400, 414, 417, 431 or 501.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _RequestLine(NamedTuple):
    """A request line; see `Head`."""

    method: str
    target: str
    line: str
    path: str
    query: str
    http_1_1: bool


_request_lines: dict[bytes, _RequestLine] = {}


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
        admitted: the mark of the check that let this head pass (`wsgi_ts.security.access`), None before.
        traceparent, tracestate: the client's place in a trace (`wsgi_ts.tracing.context`): None where it says nothing,
            empty where it says it more than once; several of the second are joined by commas.
        route, route_epoch: what the head means, for the routing table that found out, and its epoch then.
    """

    __slots__ = (
        *("admitted", "chunked", "content_length", "content_type", "expect_continue", "http_1_1", "keep_alive"),
        *("_environ", "_headers", "line", "method", "path", "query", "raw", "route", "route_epoch", "target"),
        *("traceparent", "tracestate"),
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
        self.raw = raw
        self.admitted: object = None
        self.route: Any = None
        self.route_epoch = -1
        self._environ: dict[str, Any] | None = None
        self._headers = collector.headers
        first_line = raw[: raw.index(b"\r\n")]
        # A client's heads may all differ, and yet ask for the same few things.
        words = _request_lines.get(first_line)
        if words is None:
            words = _read_request_line(first_line, parser, collector.url)
        self.method, self.target, self.line, self.path, self.query, self.http_1_1 = words
        self._read_headers(collector.headers)

    def _read_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Reads what the server itself wants to know."""
        if len(headers) > MAX_HEADERS:
            raise BadHead(431, "Too many headers.")
        self.content_length = 0
        self.chunked = False
        self.expect_continue = False
        self.content_type = b""
        self.traceparent: bytes | None = None
        self.tracestate = b""
        connection = b""
        seen = set()
        for raw_name, raw_value in headers:
            name = raw_name.lower()
            if name not in _READ_HERE:
                continue
            value = raw_value.strip(b" \t")
            if name in seen and name in _ONLY_ONCE:
                raise BadHead(400, f"More than one {_ONLY_ONCE[name]} header.")
            seen.add(name)
            if name == b"content-length":
                self.content_length = int(value)
            elif name == b"content-type":
                self.content_type = value
            elif name == b"connection":
                connection += b"," + value
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked" or not self.http_1_1 or self.chunked:
                    raise BadHead(501, "The only transfer coding this server knows is one chunked of HTTP/1.1.")
                self.chunked = True
            elif name in _OF_TRACE:
                self._note_trace(name, value)
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise BadHead(417, "The only expectation this server meets is 100-continue.")
                self.expect_continue = self.http_1_1
        self.keep_alive = _wants_keep_alive(connection, self.http_1_1)

    def _note_trace(self, name: bytes, value: bytes) -> None:
        if name == b"traceparent":
            self.traceparent = value if self.traceparent is None else b""
        else:
            self.tracestate = b"%b,%b" % (self.tracestate, value) if self.tracestate else value

    @property
    def environ(self) -> dict[str, Any]:
        """The WSGI variables that follow from the head alone; copy before use. Made when they are first asked for."""
        if self._environ is None:
            self._environ = self._make_environ()
        return self._environ

    def _make_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = {}
        for raw_name, raw_value in self._headers:
            if b"_" in raw_name:  # it would pass for another header, Content-Length included (as nginx does)
                continue
            name = raw_name.decode("latin-1").upper().replace("-", "_")
            value = raw_value.decode("latin-1").strip(" \t")
            if name in ("CONTENT_LENGTH", "CONTENT_TYPE"):
                environ[name] = value
            elif name not in ("TRANSFER_ENCODING", "EXPECT"):  # the server has seen to them
                key = "HTTP_" + name
                environ[key] = f"{environ[key]},{value}" if key in environ else value
        environ["REQUEST_METHOD"] = self.method
        environ["PATH_INFO"] = self.path
        environ["QUERY_STRING"] = self.query
        environ["RAW_URI"] = self.target
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if self.http_1_1 else "HTTP/1.0"
        return environ


def _read_request_line(first_line: bytes, parser: httptools.HttpRequestParser, url: bytes) -> _RequestLine:
    """Reads a request line that the parser has accepted, and remembers it.

    Raises:
        BadHead: it is not one of HTTP/1.1 or HTTP/1.0.
    """
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise BadHead(400, "Invalid HTTP message.")
    method, target = parser.get_method().decode("latin-1"), url.decode("latin-1")
    # Otherwise RTSP and the like, or more than one space.
    if first_line != f"{method} {target} HTTP/{version}".encode("latin-1"):
        raise BadHead(400, "Invalid HTTP message.")
    if not url.startswith(b"/"):
        url = _ABSOLUTE.sub(b"", url, count=1)
    path, _, query = url.partition(b"#")[0].partition(b"?")
    words = _RequestLine(
        method,
        target,
        f"{method} {safe_target(target)} HTTP/{version}",
        (unquote_to_bytes(path) if b"%" in path else path or b"/").decode("latin-1"),
        query.decode("latin-1"),
        version == "1.1",
    )
    if len(first_line) <= _LONGEST_REMEMBERED:
        if len(_request_lines) >= _REMEMBERED_LINES:
            _request_lines.clear()
        _request_lines[first_line] = words
    return words


def _wants_keep_alive(connection: bytes, http_1_1: bool) -> bool:
    """Whether the client wants to go on using the connection (RFC 9112 9.3); no protocol is offered to upgrade to.

    The parser is not asked: it forgets the header when a request without a body is complete.
    """
    if not connection:
        return http_1_1
    options = {option.strip().lower() for option in connection.split(b",")}
    return b"keep-alive" in options if not http_1_1 else not options & {b"close", b"upgrade"}


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
