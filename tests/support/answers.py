"""Answers of a server as bytes on a connection, one behind another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2}) [^\r\n]*")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([^\r\n\0]*)")


@dataclass(frozen=True)
class RawAnswer:
    """One answer: its status, its headers with names in lower case, its body."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse_answers(data: bytes, methods: Sequence[str] = ()) -> list[RawAnswer]:
    """Reads whole answers until the data ends; interim ones (1xx) are left out.

    Args:
        data: all that was received.
        methods: of the requests in their order, as answers to HEAD have no body; POST where none is given.

    Raises:
        AssertionError: the data is not a sequence of whole, well-formed answers.
    """
    answers: list[RawAnswer] = []
    while data:
        head, empty_line, rest = data.partition(b"\r\n\r\n")
        assert empty_line, f"cut in a head: {data[:200]!r}"
        status, headers = _read_head(head)
        data = rest
        if status < 200:
            continue
        method = methods[len(answers)] if len(answers) < len(methods) else "POST"
        body, data = (b"", data) if method == "HEAD" else _read_body(headers, data)
        answers.append(RawAnswer(status, headers, body))
    return answers


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    line, *rows = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(line)
    assert match, f"no status line: {line[:200]!r}"
    headers = {}
    for row in rows:
        field = _HEADER.fullmatch(row)
        assert field, f"no header: {row[:200]!r}"
        headers[field[1].decode().lower()] = field[2].decode("latin-1")
    return int(match[1]), headers


def _read_body(headers: dict[str, str], data: bytes) -> tuple[bytes, bytes]:
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while True:
            size, line_end, data = data.partition(b"\r\n")
            length = int(size, 16)
            assert line_end and data[length : length + 2] == b"\r\n", "cut in a chunk"
            body, data = body + data[:length], data[length + 2 :]
            if not length:
                return body, data
    if "content-length" not in headers:
        return data, b""
    length = int(headers["content-length"])
    assert len(data) >= length, f"cut in a body: {len(data)} of {length} bytes"
    return data[:length], data[length:]
