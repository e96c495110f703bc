"""The frames of HTTP/2 (RFC 9113, section 4 and 6), and header blocks that need no table (RFC 7541)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: What a client sends before its first frame.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD_BYTES: Final = 9
#: The largest payload that both sides take without asking.
DEFAULT_FRAME_BYTES: Final = 16384
MOST_FRAME_BYTES: Final = (1 << 24) - 1
DEFAULT_WINDOW: Final = 65535
MOST_WINDOW: Final = (1 << 31) - 1
LAST_STREAM: Final = (1 << 31) - 1


class FrameType:
    """What a frame is."""

    DATA: Final = 0
    HEADERS: Final = 1
    PRIORITY: Final = 2
    RST_STREAM: Final = 3
    SETTINGS: Final = 4
    PUSH_PROMISE: Final = 5
    PING: Final = 6
    GOAWAY: Final = 7
    WINDOW_UPDATE: Final = 8
    CONTINUATION: Final = 9


class Flag:
    """Bits of a frame's flags."""

    END_STREAM: Final = 0x1
    ACK: Final = 0x1
    END_HEADERS: Final = 0x4
    PADDED: Final = 0x8
    PRIORITY: Final = 0x20


class Setting:
    """What the two sides tell each other of themselves."""

    HEADER_TABLE_SIZE: Final = 1
    ENABLE_PUSH: Final = 2
    MAX_CONCURRENT_STREAMS: Final = 3
    INITIAL_WINDOW_SIZE: Final = 4
    MAX_FRAME_SIZE: Final = 5
    MAX_HEADER_LIST_SIZE: Final = 6


class ErrorCode:
    """Why a stream or a connection ends (RFC 9113, section 7)."""

    NO_ERROR: Final = 0
    PROTOCOL_ERROR: Final = 1
    INTERNAL_ERROR: Final = 2
    FLOW_CONTROL_ERROR: Final = 3
    STREAM_CLOSED: Final = 5
    FRAME_SIZE_ERROR: Final = 6
    REFUSED_STREAM: Final = 7
    CANCEL: Final = 8
    COMPRESSION_ERROR: Final = 9
    ENHANCE_YOUR_CALM: Final = 11


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Returns a frame.

    `kind` is a FrameType, `flags` are bits of Flag; stream 0 is the connection. The payload is at most as long as the
    other side takes.
    """
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), payload)


def settings_frame(values: Iterable[tuple[int, int]]) -> bytes:
    """Returns a SETTINGS frame of pairs of Setting and value."""
    payload = b"".join([number.to_bytes(2, "big") + value.to_bytes(4, "big") for number, value in values])
    return frame(FrameType.SETTINGS, 0, 0, payload)


def window_frame(stream: int, more: int) -> bytes:
    """Returns a frame that lets the other side send so many bytes more."""
    return frame(FrameType.WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big"))


def goaway_frame(last_stream: int, code: int, text: str = "") -> bytes:
    """Returns a frame that says which stream was the last one, and why no other is taken."""
    payload = last_stream.to_bytes(4, "big") + code.to_bytes(4, "big") + text.encode()
    return frame(FrameType.GOAWAY, 0, 0, payload)


def header_block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Returns a header block that stands for itself: literals without indexing, and `:status 200` by its number.

    The other side's table stays as it is, so that the same fields are always the same bytes.
    """
    parts = []
    for name, value in fields:
        if name == ":status" and value == "200":
            parts.append(b"\x88")
        else:
            parts.append(b"\x00" + _text(name.encode("ascii")) + _text(value.encode("latin-1")))
    return b"".join(parts)


def _text(data: bytes) -> bytes:
    """A string literal without Huffman's code: its length as an integer with a prefix of seven bits, then itself."""
    length = len(data)
    if length < 0x7F:
        return bytes((length,)) + data
    prefix = bytearray(b"\x7f")
    length -= 0x7F
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + data
