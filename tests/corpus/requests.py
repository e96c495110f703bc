"""Raw requests, good and bad, and what the server may answer to each.

A case is what a client sends; the test puts a good request behind it, whose answer shows where the server thinks that
the case ended. `statuses` are those that the inference API may give; the management API gives the same where the fault
is one of HTTP itself, and "not here" (404 or 405) where it is in what is asked of a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ECHO = "/predictions/echo"
#: What the server under test allows as a body; small, so that a body above it is no effort.
MAX_BODY = 200_000
NOT_HERE = frozenset({404, 405})
#: What a smuggler would hide in a body: were it read as a request, there would be an answer more.
HIDDEN = b"GET /predictions/echo HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """One raw request.

    Attributes:
        name: says what is special.
        raw: the bytes.
        statuses: allowed on the inference API. None among them allows closing without an answer.
        management: allowed on the management API.
        unfinished: more bytes are awaited when all was sent, so that the request behind it is its body.
        body: of a 200 answer; None for any.
    """

    name: str
    raw: bytes = field(repr=False)
    statuses: frozenset[int | None]
    management: frozenset[int | None]
    unfinished: bool = False
    body: bytes | None = field(default=None, repr=False)


def request(
    *lines: str | bytes, body: bytes = b"", method: str = "POST", target: str = ECHO, version: str = "HTTP/1.1"
) -> bytes:
    """Bytes of a request with these header lines besides Host; the framing is the caller's."""
    rows = [f"{method} {target} {version}", "Host: localhost", *lines]
    return b"".join(_line(row) for row in rows) + b"\r\n" + body


def with_length(body: bytes, *lines: str | bytes, target: str = ECHO, method: str = "POST") -> bytes:
    """The same with a true Content-Length."""
    return request(f"Content-Length: {len(body)}", *lines, body=body, target=target, method=method)


def chunked(body: bytes, *lines: str | bytes) -> bytes:
    """A request whose chunked body is given as it goes over the wire."""
    return request("Transfer-Encoding: chunked", *lines, body=body)


def _line(row: str | bytes) -> bytes:
    return (row.encode("utf-8") if isinstance(row, str) else row) + b"\r\n"


CASES: list[Case] = []


def _add(name: str, raw: bytes, *statuses: int | None, unfinished: bool = False) -> None:
    """A fault of HTTP: both APIs say the same."""
    allowed = frozenset(statuses)
    CASES.append(Case(name, raw, allowed, allowed, unfinished))


def _ask(name: str, raw: bytes, *statuses: int | None, body: bytes | None = None) -> None:
    """Sound HTTP: what it is worth depends on the model."""
    CASES.append(Case(name, raw, frozenset(statuses), NOT_HERE, body=body))


# N6: header fields
_add("101 fields", request(*[f"X-{number}: 1" for number in range(101)]), 431)
_ask("99 fields", request(*[f"X-{number}: 1" for number in range(98)]), 200)
_add("headers above 8192 bytes", request("X: " + "y" * 8200), 431)
_ask("headers just within the limit", request("X: " + "y" * 8100), 200)
_add("a header line of 1 MB", request("X: " + "y" * (1 << 20)), 431)
_add("a header line of 100 kB without an end", b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000, 431)
_add("empty header name", request(": y"), 400)
_add("header line without a colon", request("nothing"), 400)
_add("space before the colon", request("X : y"), 400)
_add("tab before the colon", request("Content-Length\t: 3"), 400)
_add("space in a header name", request("A B: y"), 400)
_add("folded header", request("X: y\r\n z"), 400)
_add("folded framing header", request("Transfer-Encoding:\r\n chunked"), 400)
_add("NUL in a value", request(b"X: a\0b"), 400)
_add("NUL in a name", request(b"X\0: a"), 400)
_add("control character in a value", request(b"X: a\x01b"), 400)
_add("DEL in a value", request(b"X: a\x7fb"), 400)
_add("bare CR in a value", request(b"X: a\rb"), 400)
_add("bare LF ends a line", b"POST /predictions/echo HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400)
_add("bare LF ends the request line", b"POST /predictions/echo HTTP/1.1\nHost: localhost\r\n\r\n", 400)
_add("bare LFs only", b"POST /predictions/echo HTTP/1.1\nHost: localhost\n\n", 400)
_add("bare LF before the empty line", b"POST /predictions/echo HTTP/1.1\r\nHost: localhost\n\r\n", 400)
_add("two Host headers", request("Host: y"), 400)
_add("two equal Host headers", request("Host: localhost"), 400)
_add("two Content-Types", with_length(b"{}", "Content-Type: application/json", "Content-Type: text/plain"), 400)
_ask("8-bit header value", request(b"X: \xff\xe9"), 200)
_ask("empty header value", request("X:"), 200)
_ask("header names with underscores are no framing", request("Content_Length: 5", "Transfer_Encoding: chunked"), 200)
_ask("no Host", b"POST /predictions/echo HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 200)
_ask("repeated field", request("X: a", "X: b"), 200)
_ask("leading empty lines", b"\r\n\r\n" + request(), 200)
_ask("long content type", with_length(b"ok", "Content-Type: x/" + "y" * 3000), 200, body=b"ok")
_ask("long content type with a longer body", with_length(b"z" * 9000, "Content-Type: x/" + "y" * 7000), 200)

# N7: Content-Length
_add("empty length", request("Content-Length:"), 400)
_add("negative length", request("Content-Length: -1"), 400)
_add("signed length", request("Content-Length: +1", body=b"x"), 400)
_add("hexadecimal length", request("Content-Length: 0x10", body=b"x" * 16), 400)
_add("length with an exponent", request("Content-Length: 1e3"), 400)
_add("length with an underscore", request("Content-Length: 1_0", body=b"x" * 10), 400)
_add("length with a fraction", request("Content-Length: 1.0", body=b"x"), 400)
_add("length in other digits", request("Content-Length: \u0661", body=b"x"), 400)
_add("length with a space inside", request("Content-Length: 1 0", body=b"x" * 10), 400)
_add("length 2^63", request(f"Content-Length: {2**63}"), 413)
_add("length 2^64", request(f"Content-Length: {2**64}"), 400)
_add("length of 500 digits", request("Content-Length: " + "9" * 500), 400)
_add("list of lengths", request("Content-Length: 5, 5", body=b"xxxxx"), 400)
_add("two equal lengths", request("Content-Length: 5", "Content-Length: 5", body=b"xxxxx"), 400)
_add("two lengths", request("Content-Length: 5", "Content-Length: 6", body=b"xxxxx"), 400)
_add("two lengths, one of them 0", request("Content-Length: 0", "content-length: 44", body=HIDDEN), 400)
_ask("no length on POST", request(), 200, body=b"")
_ask("length with spaces around", request("Content-Length:  3 \t", body=b"abc"), 200, body=b"abc")
_ask("length with leading zeros", request("Content-Length: 003", body=b"abc"), 200, body=b"abc")
_ask("a hidden request in the body", with_length(HIDDEN), 200, body=HIDDEN)
_ask(
    "a second length spelt with an underscore",
    request(f"Content-Length: {len(HIDDEN)}", "Content_Length: 0", body=HIDDEN),
    200,
    body=HIDDEN,
)
_add("length larger than the body", request("Content-Length: 5000", body=b"abc"), None, unfinished=True)

# N8: Transfer-Encoding
CHUNKS = b"3\r\nabc\r\n0\r\n\r\n"
_add("length and chunked", request("Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNKS), 400)
_add("chunked and length", request("Transfer-Encoding: chunked", "Content-Length: 5", body=CHUNKS), 400)
_add("chunked twice in one", request("Transfer-Encoding: chunked, chunked", body=CHUNKS), 400, 501)
_add("chunked twice", request("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=CHUNKS), 400, 501)
_add("identity", request("Transfer-Encoding: identity", body=CHUNKS), 400, 501)
_add("chunked then identity", request("Transfer-Encoding: chunked, identity", body=CHUNKS), 400, 501)
_add("gzip, chunked", request("Transfer-Encoding: gzip, chunked", body=CHUNKS), 400, 501)
_add("xchunked", request("Transfer-Encoding: xchunked", body=CHUNKS), 400, 501)
_add("chunked with a parameter", request("Transfer-Encoding: chunked;q=1", body=CHUNKS), 400, 501)
_add("quoted chunked", request('Transfer-Encoding: "chunked"', body=CHUNKS), 400, 501)
_add("empty coding", request("Transfer-Encoding:", body=CHUNKS), 400, 501)
_add("vertical tab before chunked", request(b"Transfer-Encoding: \x0bchunked", body=CHUNKS), 400, 501)
_add("non-breaking space before chunked", request(b"Transfer-Encoding: \xa0chunked", body=CHUNKS), 400, 501)
_add("space in the name", request("Transfer-Encoding : chunked", body=CHUNKS), 400)
_add("HTTP/1.0 chunked", request("Transfer-Encoding: chunked", body=CHUNKS, version="HTTP/1.0"), 400, 501)
_ask("chunked in capitals", request("TRANSFER-ENCODING: CHUNKED", body=CHUNKS), 200, body=b"abc")
_ask("chunked after a tab", request("Transfer-Encoding:\tchunked ", body=CHUNKS), 200, body=b"abc")
_ask(
    "length wins over a coding spelt with an underscore",
    request(f"Content-Length: {len(HIDDEN)}", "Transfer_Encoding: chunked", body=HIDDEN),
    200,
    body=HIDDEN,
)

# N9: chunks
_ask("chunks", chunked(CHUNKS), 200, body=b"abc")
_ask("a hidden request in a chunk", chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)), 200, body=HIDDEN)
_ask("chunk size with leading zeros", chunked(b"0003\r\nabc\r\n0\r\n\r\n"), 200, body=b"abc")
_ask("chunk size in capitals", chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), 200, body=b"0123456789")
_ask("extension", chunked(b"3;a=b;c\r\nabc\r\n0;d\r\n\r\n"), 200, body=b"abc")
_ask("trailers", chunked(b"3\r\nabc\r\n0\r\nA: b\r\nHost: y\r\n\r\n"), 200, body=b"abc")
_add("length as a trailer", chunked(b"3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n"), 400)
_ask("no content", chunked(b"0\r\n\r\n"), 200, body=b"")
_ask("1000 chunks of one byte", chunked(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n"), 200, body=b"x" * 1000)
_add("chunk size with a sign", chunked(b"+3\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size below 0", chunked(b"-3\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size with an underscore", chunked(b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"), 400)
_add("chunk size with 0x", chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size after a space", chunked(b" 3\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size that overflows", chunked(b"10000000000000003\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size of 2^63", chunked(b"8000000000000000\r\nabc\r\n0\r\n\r\n"), 400, 413, None, unfinished=True)
_add("no chunk size", chunked(b"\r\nabc\r\n0\r\n\r\n"), 400)
_add("chunk size that is no number", chunked(b"x\r\nabc\r\n0\r\n\r\n"), 400)
_add("bare LF behind the size", chunked(b"3\nabc\r\n0\r\n\r\n"), 400)
_add("bare LF behind the data", chunked(b"3\r\nabc\n0\r\n\r\n"), 400)
_add("nothing behind the data", chunked(b"3\r\nabc0\r\n\r\n"), 400)
_add("data longer than the chunk", chunked(b"3\r\nabcd\r\n0\r\n\r\n"), 400)
_add("bare LF in an extension", chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), 400)
_add("bare LFs at the end", chunked(b"3\r\nabc\r\n0\n\n"), 400, None)
_add("bad trailer", chunked(b"3\r\nabc\r\n0\r\nno colon\r\n\r\n"), 400)
_add("truncated chunk", chunked(b"ffff\r\nabc"), None, 400, unfinished=True)
_add("extension of 1 MB", chunked(b"3;" + b"x" * (1 << 20) + b"\r\nabc\r\n0\r\n\r\n"), 400)
_add("trailers of 1 MB", chunked(b"3\r\nabc\r\n0\r\n" + b"A: b\r\n" * (1 << 18) + b"\r\n"), 400)
_add("200 000 chunks of one byte", chunked(b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n"), 400, 413)

# N10: size
_add("one byte too many", with_length(b"x" * (MAX_BODY + 1)), 413)
_add("10 GB announced", request("Content-Length: 10000000000"), 413)
_add("chunks above the limit", chunked((b"10000\r\n" + b"x" * 65536 + b"\r\n") * 4 + b"0\r\n\r\n"), 413)
_ask("exactly the limit", with_length(b"x" * MAX_BODY), 200, body=b"x" * MAX_BODY)
_ask("no decoding of gzip", with_length(b"\x1f\x8b\x08junk", "Content-Encoding: gzip"), 200, body=b"\x1f\x8b\x08junk")

# N11: Expect
_ask("continue", with_length(b"abc", "Expect: 100-continue"), 200, body=b"abc")
_ask("continue, in capitals", with_length(b"abc", "EXPECT: 100-CONTINUE"), 200, body=b"abc")
_ask("continue, without a body", request("Expect: 100-continue"), 200)
_add("unknown expectation", with_length(b"abc", "Expect: the worst"), 417)
_add("continue, and one more", with_length(b"abc", "Expect: 100-continue, more"), 417)
_add("continue, too large", request(f"Content-Length: {MAX_BODY + 1}", "Expect: 100-continue"), 413)

# N14: targets
for _target, _status in {
    "http://x/predictions/echo": 200,
    "HTTPS://x:1/predictions/echo": 200,
    "http://x": 405,
    "http://x?/predictions/echo": 405,
    "*": 404,
    "//predictions/echo": 404,
    "//x/predictions/echo": 404,
    "/predictions//echo": 404,
    "/predictions/../predictions/echo": 404,
    "/predictions/%2e%2e/echo": 404,
    "/predictions/echo/../../etc/passwd": 404,
    "/predictions%2Fecho": 200,
    "/predictions/%65cho": 200,
    "/predictions/%2565cho": 404,
    "/predictions/echo/": 200,
    "/predictions/echo%00": 404,
    "/predictions/%ff": 404,
    "/predictions/%c0%ae%c0%ae": 404,
    "/predictions/%0d%0aX:%20y": 404,
    "/predictions/%": 404,
    "/predictions/%zz": 404,
    "/predictions/echo;a=b": 404,
    "/predictions/echo?": 200,
    "/predictions/echo" + "?" * 1000: 200,
    "/predictions/echo?a=b#c": 200,
    "/predictions/echo#": 200,
    "/predictions/echo?%zz=%&&&==&=": 200,
    "/predictions/echo/1.0/" + "a" * 3000: 200,
    "/predictions/echo/1.0/" + "%0d%0a" * 300: 200,
    "/" + "a" * 4000: 404,
    "/" + "/" * 4000: 405,
    "/" + "a/" * 2000: 404,
    "/invocations?model_name=echo": 200,
    "/invocations?model_name=%E5%90%8D": 404,
    "/invocations?model_name=%ff%00": 404,
    "/invocations?model_name=echo&model_name=nope": 200,
    "/invocations?" + "a=b&" * 990 + "model_name=echo": 200,
    "/nope": 404,
}.items():
    _ask(f"target {_target[:60]}", request(target=_target), _status)
_add("target of 8 KB", request(target="/" + "a" * 8192), 414)
_add("request line of 100 kB without an end", b"GET /" + b"a" * 100_000, 414)
_add("raw 8-bit target", b"GET /\xff HTTP/1.1\r\n\r\n", 400)
_add("space in the target", request(target="/a b"), 400)
_add("two spaces", request(target=" /predictions/echo"), 400)
_add("target without a slash", request(target="predictions/echo"), 400)
_add("no target", b"POST HTTP/1.1\r\nHost: localhost\r\n\r\n", 400)
_add("no version", b"POST /predictions/echo\r\nHost: localhost\r\n\r\n", 400)
for _version in (
    *("HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/11", "HTTP/1.1 ", "http/1.1"),
    *("RTSP/1.0", "ICE/1.0", "XXX/1.1"),
):
    _add(f"version {_version}", request(version=_version), 400)
_add("not HTTP: TLS", bytes.fromhex("16030100c8010000c40303") + b"\0" * 40, 400)
_add("not HTTP: HTTP/2 preface without its line ends", b"PRI * HTTP/2.0\n\nSM\n\n", 400)
_add("not HTTP: a PROXY line", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + request(), 400)
_add("not HTTP: noise", bytes(range(256)), 400)
_add("not HTTP: spaces", b"  \r\n\r\n", 400)

# N15: methods
for _method in ("TRACE", "CONNECT", "PROPFIND", "M-SEARCH", "SOURCE", "QUERY", "LINK"):
    # TorchServe answers a prediction whatever the method; methods that the app does not know are refused.
    _ask(f"method {_method}", request(method=_method), 200, 400, 404, 405)
for _method in ("PUT", "DELETE", "PATCH"):
    CASES.append(Case(f"method {_method}", request(method=_method), frozenset({200}), NOT_HERE))
_ask("HEAD", request(method="HEAD"), 200)
_ask("HEAD with a body", with_length(HIDDEN, method="HEAD"), 200)
_ask("HEAD of an unknown model", request(method="HEAD", target="/predictions/nope"), 404)
_ask("GET with a body", with_length(HIDDEN, method="GET"), 200, body=HIDDEN)
_ask("OPTIONS of a model", request(method="OPTIONS"), 200)
_add("OPTIONS *", request(method="OPTIONS", target="*"), 404)
CASES.append(Case("OPTIONS /", request(method="OPTIONS", target="/"), frozenset({200}), frozenset({200})))
_add("CONNECT to an authority", request(method="CONNECT", target="x:80"), 400, 404, 405)
for _method in ("get", "Post", "BREW", "X" * 1024, "GE T", "", "G\0T", "WEBSOCKET"):
    _add(f"method {_method[:20]!r}", request(method=_method), 400)

# N18: types, conditions, upgrades
_ask("unknown charset", with_length(b"abc", "Content-Type: text/plain; charset=klingon"), 200, body=b"abc")
_ask("text that is no UTF-8", with_length(b"\xff\xfe", "Content-Type: text/plain"), 200, body=b"\xff\xfe")
_ask("broken content type", with_length(b"abc", "Content-Type: ;;;===//"), 200, body=b"abc")
_ask("empty content type", with_length(b"abc", "Content-Type:"), 200, body=b"abc")
_ask("8-bit content type", with_length(b"abc", b"Content-Type: \xff/\xfe"), 200, body=b"abc")
_ask("nonsense in Accept", request("Accept: ;;q=x, */*/*, \\"), 200)
_ask("Range", with_length(b"abcdef", "Range: bytes=0-1"), 200, body=b"abcdef")
_ask("conditions", request("If-Match: x", "If-Modified-Since: never", "If-None-Match: *"), 200)
_ask("cookies", request("Cookie: =;;a=b=c"), 200)
_ask("proxies", request("X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4", "X-Real-IP: 1.2.3.4"), 200)
_ask("Connection with nonsense", request("Connection: ,,;x, keep-alive"), 200)

# N16: multipart
BOUNDARY = "Content-Type: multipart/form-data; boundary=b"


def part(headers: str, value: bytes) -> bytes:
    """One part of a multipart body with the boundary "b"."""
    return b"--b\r\n" + headers.encode() + b"\r\n\r\n" + value + b"\r\n"


FIELD = part('Content-Disposition: form-data; name="body"', b"abc")
END = b"--b--\r\n"
NAMED = 'Content-Disposition: form-data; name="body"'
TYPED = f'{NAMED}; filename="f"\r\nContent-Type: '
for _name, _line_, _body, _statuses in (
    ("good", BOUNDARY, FIELD + END, (200,)),
    ("no boundary", "Content-Type: multipart/form-data", FIELD + END, (400,)),
    ("empty boundary", "Content-Type: multipart/form-data; boundary=", FIELD + END, (400,)),
    ("long boundary", "Content-Type: multipart/form-data; boundary=" + "b" * 4000, FIELD + END, (400,)),
    ("odd boundary", 'Content-Type: multipart/form-data; boundary="a\\"b', FIELD + END, (400,)),
    ("another boundary", "Content-Type: multipart/form-data; boundary=c", FIELD + END, (400,)),
    ("no end", BOUNDARY, FIELD, (400,)),
    ("nothing", BOUNDARY, b"", (400,)),
    ("only an end", BOUNDARY, END, (200, 400)),
    ("LF only", BOUNDARY, (FIELD + END).replace(b"\r\n", b"\n"), (200, 400)),
    ("no name", BOUNDARY, part("Content-Disposition: form-data", b"x") + END, (400,)),
    ("no disposition", BOUNDARY, part("X: y", b"x") + END, (400,)),
    ("broken part header", BOUNDARY, part("no colon", b"x") + END, (400,)),
    ("header of 100 kB", BOUNDARY, part("X: " + "y" * 100_000, b"x") + END, (400,)),
    ("1000 headers", BOUNDARY, part("X: y\r\n" * 1000, b"x") + END, (400,)),
    ("duplicate names", BOUNDARY, FIELD + FIELD + END, (200,)),
    ("path as file name", BOUNDARY, part(f'{NAMED}; filename="../../x"', b"x") + END, (200,)),
    ("unknown charset", BOUNDARY, part(f"{TYPED}text/plain; charset=klingon", b"x") + END, (200, 400)),
    ("base64", BOUNDARY, part(f"{NAMED}\r\nContent-Transfer-Encoding: base64", b"x") + END, (200, 400)),
    ("wrong length in a part", BOUNDARY, part(f"{NAMED}\r\nContent-Length: 99", b"x") + END, (200, 400)),
    ("nested", BOUNDARY, part(f"{TYPED}multipart/mixed; boundary=c", b"--c\r\n\r\nx\r\n--c--") + END, (200,)),
    ("JSON part too deep", BOUNDARY, part(f"{TYPED}application/json", b"[" * 101 + b"]" * 101) + END, (400,)),
    ("1000 parts", BOUNDARY, part(NAMED, b"") * 1000 + END, (200,)),
    ("1001 parts", BOUNDARY, part(NAMED, b"") * 1001 + END, (400,)),
    ("many delimiters", BOUNDARY, b"--b\r\n" * 30_000, (400,)),
    ("many dashes", BOUNDARY, b"\r\n--" * 40_000, (400,)),
):
    _ask(f"multipart: {_name}", with_length(_body, _line_), *_statuses)

# N17: JSON
for _name, _body, _statuses in (
    ("100 deep", b"[" * 100 + b"]" * 100, (200,)),
    ("101 deep", b"[" * 101 + b"]" * 101, (400,)),
    ("101 deep, objects", b'{"a":' * 101 + b"1" + b"}" * 101, (400,)),
    ("50 000 deep", b"[" * 50_000 + b"]" * 50_000, (400,)),
    ("100 000 deep and cut", b"[" * 100_000, (400,)),
    ("brackets in strings", b'["' + b"[" * 500 + b'\\"' + b"{" * 500 + b'"]', (200,)),
    ("many brackets, not deep", b"[" + b"[1]," * 5000 + b"[]]", (200,)),
    ("quotes without an end", b'[[["' + b'\\"' * 90_000, (200,)),
    ("backslash at the end", b"[" * 101 + b'"' + b'\\"' * 50_000 + b"\\", (400, 200)),
    ("1e400", b"1e400", (200,)),
    ("NaN", b"[NaN, Infinity, -Infinity]", (200,)),
    ("number of 100 kB", b"1" * 100_000, (200,)),
    ("number of 100 kB with a point", b"1." + b"1" * 100_000, (200,)),
    ("duplicate keys", b'{"a": 1, "a": 2}', (200,)),
    ("BOM", b"\xef\xbb\xbf[1]", (200,)),
    ("UTF-16", "[1]".encode("utf-16"), (200,)),
    ("lone surrogate", b'"\\ud800"', (200,)),
    ("truncated", b'{"a": [1, ', (200,)),
    ("empty", b"", (200,)),
    ("trailing data", b"[1] [2]", (200,)),
    ("NUL", b'"\0"', (200,)),
    ("not UTF-8", b'"\xff\xfe"', (200,)),
):
    _ask(f"JSON: {_name}", with_length(_body, "Content-Type: application/json"), *_statuses)

# N19: forms
FORM = "Content-Type: application/x-www-form-urlencoded"
for _name, _body, _statuses in (
    ("1000 fields", b"body=x&" * 999 + b"body=y", (200,)),
    ("1001 fields", b"body=x&" * 1000 + b"body=y", (400,)),
    ("100 000 separators", b"&" * 100_000, (400,)),
    ("value of 150 kB", b"body=" + b"x" * 150_000, (200,)),
    ("broken percent signs", b"body=%&b%=%zz&=c&%00=%00", (200,)),
    ("arrays", b"body[]=1&body[0][a]=2&body=3", (200,)),
    ("no UTF-8", b"\xff=\xfe&body=\xff", (200,)),
    ("only equal signs", b"=" * 1000, (200,)),
):
    _ask(f"form: {_name}", with_length(_body, FORM), *_statuses)

# N20: names
for _name, _status in {
    "%c3%a9cho": 404,  # NFC
    "e%cc%81cho": 404,  # NFD
    "%e2%80%aeohce": 404,  # right to left
    "%f0%9f%98%80": 404,
    "%d0%b5cho": 404,  # a Cyrillic letter that looks like an e
    "a" * 255: 404,
    "a" * 256: 404,
    "%3Cscript%3E": 404,
    "..": 404,
    "echo%20": 404,
    "ECHO": 404,
}.items():
    _ask(f"name {_name[:30]}", request(target=f"/predictions/{_name}"), _status)
