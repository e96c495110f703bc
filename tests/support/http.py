"""HTTP as the tests speak it: one request with http.client, or raw bytes on a socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: names of headers in lower case, values of repeated ones joined by a comma."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The body, read as UTF-8."""
        return self.body.decode()


def request(
    port: int,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
    chunks: Iterable[bytes] | None = None,
    timeout: float = 60.0,
    tls: ssl.SSLContext | None = None,
) -> Reply:
    """Sends one request on a connection of its own and reads the whole answer.

    Args:
        port: where to, on 127.0.0.1.
        method: HTTP method.
        path: the request target, sent as it is.
        headers: besides Host and the framing headers.
        body: sent with Content-Length; None sends neither body nor length.
        chunks: sent chunked, instead of `body`.
        timeout: limit of every socket operation, in seconds.
        tls: what to check the server by; None for plain HTTP.
    """
    if tls is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=timeout, context=tls)
    try:
        return exchange(connection, method, path, headers=headers, body=body, chunks=chunks)
    finally:
        connection.close()


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
    chunks: Iterable[bytes] | None = None,
) -> Reply:
    """Sends one request on `connection` and reads its answer; the connection may stay open."""
    payload = body.encode() if isinstance(body, str) else body
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    if chunks is not None:
        connection.putheader("Transfer-Encoding", "chunked")
    elif payload is not None:
        connection.putheader("Content-Length", str(len(payload)))
    connection.endheaders()
    # Who has refused a request may close before all of it has come: the answer is there to be read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if chunks is not None:
            for chunk in chunks:
                connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            connection.send(b"0\r\n\r\n")
        elif payload:
            connection.send(payload)
    return read_reply(connection.getresponse())


def read_reply(response: http.client.HTTPResponse) -> Reply:
    """The rest of an answer."""
    body = response.read()
    names: dict[str, str] = {}
    for name, value in response.getheaders():
        key = name.lower()
        names[key] = f"{names[key]}, {value}" if key in names else value
    return Reply(response.status, response.reason, names, body)


class RawConnection:
    """A socket to the server that sends bytes as they are and reads answers one after another."""

    def __init__(self, port: int, timeout: float = 60.0, tls: ssl.SSLContext | None = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="127.0.0.1")
        self._reader = self.sock.makefile("rb")

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Sends bytes."""
        self.sock.sendall(data)

    def read_head(self) -> tuple[bytes, dict[str, str]]:
        """Reads a status line and headers; names in lower case."""
        line = self._reader.readline()
        headers: dict[str, str] = {}
        while True:
            row = self._reader.readline().rstrip(b"\r\n")
            if not row:
                return line.rstrip(b"\r\n"), headers
            name, _, value = row.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()

    def read_answer(self) -> tuple[bytes, dict[str, str], bytes]:
        """Reads one whole answer with a Content-Length or chunks: status line, headers, body."""
        line, headers = self.read_head()
        if headers.get("transfer-encoding") == "chunked":
            return line, headers, b"".join(self.read_chunks())
        return line, headers, self._reader.read(int(headers.get("content-length", "0")))

    def read_chunks(self) -> Iterator[bytes]:
        """Yields the chunks of a body as they arrive."""
        while True:
            size = int(self._reader.readline().split(b";")[0], 16)
            data = self._reader.read(size)
            self._reader.readline()
            if size == 0:
                return
            yield data

    def read_exactly(self, size: int) -> bytes:
        """Reads so many bytes of a body."""
        return self._reader.read(size)

    def read_rest(self) -> bytes:
        """Reads until the server closes the connection."""
        return self._reader.read()

    def at_end(self) -> bool:
        """Waits for the next byte or the end: True when the server closed the connection."""
        try:
            return self._reader.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        """Closes the socket."""
        self._reader.close()
        self.sock.close()
