"""How gRPC lies in HTTP/2: messages with their lengths before them, deadlines, metadata, the status at the end.

The source is gRPC's own text, "gRPC over HTTP2".
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Sequence
from urllib.parse import quote

from wsgi_ts.http2.frames import header_block
from wsgi_ts.http2.stream import Fields
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.status import StatusCode

#: Names and values; those of names that end in `-bin` are bytes.
Metadata = Sequence[tuple[str, "str | bytes"]]

_PREFIX_BYTES = 5
_CONTENT_TYPE = b"application/grpc"
#: zlib's windows: with 32 its gzip form, otherwise its own.
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_ENCODINGS = "identity,deflate,gzip"
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
#: Of the printable characters only this one is not sent as it is.
_UNQUOTED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_OWN_FIELDS = frozenset((b"content-type", b"te", b"user-agent", b"grpc-timeout", b"grpc-encoding"))
#: The longest text of a status, in bytes of UTF-8: quoted, it has to fit into one frame.
_MOST_TEXT = 4096

#: The head of an answer.
HEAD = header_block([(":status", "200"), ("content-type", "application/grpc")])
#: The end of one that went well.
OK = header_block([("grpc-status", "0")])


class RequestHead:
    """What the header block of a call says.

    Attributes:
        path: `/package.Service/Method`.
        timeout_s: after so many seconds the client waits no longer; None for no end.
        encoding: of compressed messages.
        refusal: an answer to what is no gRPC call, as HTTP's status and a text; None for a call.

    Raises:
        Failure: the call cannot be served.
    """

    def __init__(self, fields: Fields) -> None:
        self.path = ""
        self.timeout_s: float | None = None
        self.encoding = b"identity"
        self._fields = fields
        self._metadata: list[tuple[str, str | bytes]] | None = None
        method = content_type = b""
        for name, value in fields:
            if name == b":path":
                self.path = value.decode("latin-1")
            elif name == b":method":
                method = value
            elif name == b"content-type":
                content_type = value
            elif name == b"grpc-timeout":
                self.timeout_s = _timeout_s(value)
            elif name == b"grpc-encoding":
                self.encoding = value
        self.refusal: tuple[int, str] | None = None
        if method != b"POST":
            self.refusal = 405, "gRPC calls are POST requests"
        elif not content_type.startswith(_CONTENT_TYPE):
            self.refusal = 415, "gRPC calls have the content type application/grpc"

    @property
    def metadata(self) -> Metadata:
        """What the client sends beside its messages."""
        if self._metadata is None:
            fields = [each for each in self._fields if each[0] not in _OWN_FIELDS and not each[0].startswith(b":")]
            self._metadata = [(name.decode("latin-1"), _value(name, value)) for name, value in fields]
        return self._metadata


def _value(name: bytes, value: bytes) -> str | bytes:
    if not name.endswith(b"-bin"):
        return value.decode("latin-1")
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return b""


def _timeout_s(value: bytes) -> float:
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise Failure(StatusCode.INTERNAL, f"no grpc-timeout: {value.decode('latin-1')[:40]!r}")
    return int(found[1]) * _SECONDS[found[2]]


class MessageReader:
    """Puts the messages of one call together.

    Args:
        limit: the largest message, in bytes, as it is sent and decompressed.

    Attributes:
        held: bytes of a message that is not complete.
    """

    __slots__ = ("_buffer", "_encoding", "_limit", "_wanted")

    def __init__(self, encoding: bytes, limit: int) -> None:
        self._encoding = encoding
        self._limit = limit
        self._buffer = bytearray()
        self._wanted = _PREFIX_BYTES

    @property
    def held(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Takes a part of the body; returns the messages that are complete with it.

        Raises:
            Failure: a message is too large, or compressed in a way that is not known.
        """
        if not self._buffer and len(data) >= _PREFIX_BYTES:
            # Mostly a message comes whole.
            end = _PREFIX_BYTES + self._length(data)
            if end == len(data):
                return [self._message(data[0], data[_PREFIX_BYTES:])]
        self._buffer += data
        messages = []
        while len(self._buffer) >= self._wanted:
            if self._wanted == _PREFIX_BYTES:
                self._wanted += self._length(self._buffer)
                if len(self._buffer) < self._wanted:
                    break
            body = bytes(memoryview(self._buffer)[_PREFIX_BYTES : self._wanted])
            messages.append(self._message(self._buffer[0], body))
            del self._buffer[: self._wanted]
            self._wanted = _PREFIX_BYTES
        return messages

    def _length(self, data: bytes | bytearray) -> int:
        length = int.from_bytes(data[1:_PREFIX_BYTES], "big")
        if length > self._limit:
            raise too_large(length, self._limit)
        return length

    def _message(self, flag: int, body: bytes) -> bytes:
        if not flag:
            return body
        bits = _WINDOW_BITS.get(self._encoding)
        if flag != 1 or bits is None:
            encoding = self._encoding.decode("latin-1")
            raise Failure(StatusCode.UNIMPLEMENTED, f"messages compressed as {encoding!r}; known are {_ENCODINGS}")
        unpacker = zlib.decompressobj(bits)
        try:
            message = unpacker.decompress(body, self._limit + 1)
        except zlib.error as error:
            raise Failure(StatusCode.INTERNAL, f"a message that cannot be decompressed: {error}") from error
        if len(message) > self._limit:
            raise too_large(len(message), self._limit)
        if not unpacker.eof:
            raise Failure(StatusCode.INTERNAL, "a compressed message that is cut off")
        return message


def too_large(length: int, limit: int) -> Failure:
    """A message above max_request_size, in gRPC's words."""
    return Failure(StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({length} vs. {limit})")


def framed(message: bytes) -> bytes:
    """Returns a message as it is sent: not compressed."""
    return b"\x00%b%b" % (len(message).to_bytes(4, "big"), message)


def status_fields(code: StatusCode, text: str, metadata: Metadata = ()) -> list[tuple[str, str]]:
    """Returns the trailers that end a call."""
    fields = [("grpc-status", str(code.value))]
    if text:
        fields.append(("grpc-message", quote(text.encode()[:_MOST_TEXT], safe=_UNQUOTED)))
    if code == StatusCode.UNIMPLEMENTED:
        fields.append(("grpc-accept-encoding", _ENCODINGS))
    for name, value in metadata:
        fields.append((name, value if isinstance(value, str) else base64.b64encode(value).decode()))
    return fields


def status_block(code: StatusCode, text: str, metadata: Metadata = ()) -> bytes:
    """Returns the header block of trailers."""
    return OK if not code and not text and not metadata else header_block(status_fields(code, text, metadata))


def only_status(code: StatusCode, text: str, metadata: Metadata = ()) -> bytes:
    """Returns the header block of an answer that has no message."""
    return HEAD + header_block(status_fields(code, text, metadata))


def refusal_block(status: int) -> bytes:
    """Returns the header block of an answer to what is no gRPC call."""
    return header_block([(":status", str(status)), ("content-type", "text/plain; charset=utf-8")])
