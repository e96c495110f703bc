"""What clients send: heads, bodies, forms, JSON, tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.dataplane.routes import prediction_parts
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving import inputs
from wsgi_ts.http.body import ChunkedBody
from wsgi_ts.http.form_field import form_field, is_form
from wsgi_ts.http.head import BadHead, Head, check_partial_head, parse_head
from wsgi_ts.security.access import Access, scope_of
from wsgi_ts.settings.config import Config
from wsgi_ts.tracing.context import new_trace, parse, with_context

_STATUSES = {400, 414, 417, 431, 501}
_FORBIDDEN_IN_A_VALUE = re.compile(r"[\r\n\0]")


def head(data: bytes) -> None:
    """A head is refused with one of five statuses, or is read as one request with one framing."""
    end = data.find(b"\r\n\r\n")
    raw = data[: end + 4] if end >= 0 else data + b"\r\n\r\n"
    try:
        check_partial_head(raw)
        parsed = parse_head(raw)
    except BadHead as error:
        assert error.status in _STATUSES, error.status
        return
    assert parsed.content_length >= 0
    assert not (parsed.chunked and parsed.content_length), "two framings"
    names = [line.partition(b":")[0].strip().lower() for line in raw.split(b"\r\n")[1:]]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1, "a smuggler's head"
    assert parsed.line.isascii() and parsed.line.isprintable(), parsed.line
    for name, value in parsed.environ.items():
        assert isinstance(value, str) and (name == "PATH_INFO" or not _FORBIDDEN_IN_A_VALUE.search(value)), name
        assert name == "PATH_INFO" or "\0" not in name
    assert _meaning(Head(raw)) == _meaning(parsed), "remembered otherwise than read"
    for kinds in (("inference",), ("management",), ("inference", "management")):
        scope_of(kinds, parsed.path)
    try:
        prediction_parts(parsed.path, parsed.query)
    except ServerError as error:
        assert 400 <= error.status < 500, error


def _meaning(parsed: Head) -> tuple[Any, ...]:
    framing = (parsed.content_length, parsed.chunked, parsed.keep_alive, parsed.expect_continue)
    return (*framing, parsed.method, parsed.path, parsed.query, parsed.content_type, parsed.environ)


def trace_context(data: bytes) -> None:
    """Whatever a client says of its trace, what goes on says one valid place in a trace, and all else as before."""
    raw = b"POST / HTTP/1.1\r\n" + data + b"\r\n\r\n"
    raw = raw[: raw.index(b"\r\n\r\n") + 4]
    try:
        parsed = parse_head(raw)
    except BadHead:
        return
    came = parse(parsed.traceparent, parsed.tracestate)
    ours = new_trace(is_sampled=True) if came is None else came.child()
    made = Head(with_context(raw, ours, has_one=parsed.traceparent is not None or bool(parsed.tracestate)))
    assert parse(made.traceparent, made.tracestate) == ours, made.raw
    assert len(ours.state) <= 512
    said = ("HTTP_TRACEPARENT", "HTTP_TRACESTATE")
    before, after = ({k: v for k, v in each.environ.items() if k not in said} for each in (parsed, made))
    assert before == after, made.raw


def chunked(data: bytes) -> None:
    """However a body is cut, it means the same; what is accepted is what the RFC says, and ends where it says."""
    step, wire = (data[0] % 7) + 1 if data else 1, data[1:]
    whole, cut = _decoded(wire, len(wire) or 1), _decoded(wire, step)
    assert whole == cut, f"whole {whole}, in steps of {step} {cut}"
    status, content, rest = whole
    if status == "complete":
        assert wire.endswith(rest)
        assert content == _strictly_decoded(wire[: len(wire) - len(rest)])


def _decoded(wire: bytes, step: int) -> tuple[str, bytes, bytes]:
    body = ChunkedBody(limit=1000)
    for at in range(0, len(wire), step):
        try:
            body.feed(wire[at : at + step])
        except BadHead as error:
            assert error.status == 400
            return "refused", b"", b""
        if body.too_large:
            return "too large", b"", b""
        if body.complete:
            return "complete", bytes(body.data), body.rest + wire[at + step :]
    return "unfinished", b"", b""


def _strictly_decoded(wire: bytes) -> bytes:
    """RFC 9112 7.1, once more and as plainly as can be."""
    content = b""
    while True:
        line, _, wire = wire.partition(b"\r\n")
        size = re.match(rb"[0-9A-Fa-f]+(?=[ \t]*(?:;|$))", line)
        assert size is not None, line
        length = int(size[0], 16)
        if not length:
            break
        content += wire[:length]
        assert wire[length : length + 2] == b"\r\n"
        wire = wire[length + 2 :]
    *trailers, nothing, behind = wire.split(b"\r\n")
    assert (nothing, behind) == (b"", b"") and all(b":" in each for each in trailers), wire
    return content


def form(data: bytes) -> None:
    """A form becomes a row, or a 400 for this one request, however its bytes reach the parser."""
    content_type, _, body = data.partition(b"\n")
    if is_form(content_type):
        assert isinstance(form_field(content_type, body, "model_name"), str | None)
    whole, cut = (_row(content_type, body, chunk_bytes) for chunk_bytes in (1 << 20, 7))
    # What is refused as a whole may pass in pieces, as far as they go; and the parser lets a bare line feed into a
    # part's header only where the line's end has come, too.
    assert whole == cut or isinstance(whole, str) or "Invalid line break" in cut
    if isinstance(whole, dict):
        assert len(whole) <= inputs.MAX_FIELDS


def _row(content_type: bytes, body: bytes, chunk_bytes: int) -> dict[str, Any] | str:
    kept, inputs._CHUNK_BYTES = inputs._CHUNK_BYTES, chunk_bytes
    types: dict[str, str] = {}
    try:
        row = inputs.build_row(content_type.decode("latin-1"), memoryview(body), types=types)
    except inputs.BadInput as error:
        return re.sub(r"\d+", "", str(error))
    finally:
        inputs._CHUNK_BYTES = kept
    assert set(types) == set(row)
    headers = inputs.LazyHeaders(b"POST / HTTP/1.1\r\nContent-Type: " + content_type + b"\r\n\r\n", {}, types)
    assert set(row) <= set(headers.to_dict())
    return row


def json_body(data: bytes) -> None:
    """JSON becomes what `json` says, stays bytes, or is refused for its depth; reading never recurses too deep."""
    try:
        value = inputs.decode_value("application/json", memoryview(data))
    except inputs.BadInput:
        assert data.count(b"[") + data.count(b"{") > inputs.MAX_JSON_DEPTH
        return
    if isinstance(value, bytearray):
        assert value == data
    else:
        json.dumps(value)


_TOKEN = "fuzzed-token-0123456789abcdefghijklmnopqrstuv"
_folder = tempfile.TemporaryDirectory(prefix="wts-fuzz-")
_access: dict[tuple[str, ...], Access] = {}


def access(data: bytes) -> None:
    """Behind tokens, a head passes with exactly the right one, or asks for what takes none."""
    if not _access:
        _publish()
    raw = b"GET " + data.replace(b"TOKEN", _TOKEN.encode()).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    try:
        check_partial_head(raw)
        parsed = Head(raw)
    except BadHead:
        return
    for kinds, gate in _access.items():
        passes = gate.refusal_of(parsed) is None
        if not passes:
            continue
        assert scope_of(kinds, parsed.path) is None or f"Bearer {_TOKEN}" in _spaces_joined(raw), parsed.path
        assert _TOKEN.encode() not in parsed.raw or _TOKEN in parsed.target or not _is_in_authorization(parsed.raw)


def _spaces_joined(raw: bytes) -> str:
    return re.sub(r"\s+", " ", raw.decode("latin-1"))


def _is_in_authorization(raw: bytes) -> bool:
    lines = [line.partition(b":") for line in raw.split(b"\r\n")[1:]]
    return any(name.lower() == b"authorization" and _TOKEN.encode() in value for name, _, value in lines)


def _publish() -> None:
    prefix = f"wsgi-ts-{'f' * 24}{os.getpid():08x}"
    board = Board.create(prefix)
    Board.unlink(prefix)
    key = {"sha256": hashlib.sha256(_TOKEN.encode()).hexdigest(), "wall_end": None, "monotonic_end": None}
    Path(_folder.name, "tokens.json").write_text(json.dumps({"inference": key, "management": key, "API": key}))
    board.bump_token_epoch()
    for kinds in (("inference",), ("management",), ("inference", "management")):
        _access[kinds] = Access(kinds, Config(disable_token_authorization=False), Path(_folder.name), board)
