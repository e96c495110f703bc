"""Header blocks that a client sends (RFC 9113, section 4.3; RFC 7541), decoded by the library hpack."""

from __future__ import annotations

from typing import Final

from hpack import Decoder
from hpack.exceptions import HPACKError

from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import ErrorCode
from wsgi_ts.http2.stream import Fields

#: Names and values of one header block, in bytes as they are sent and as RFC 7541 counts them.
MOST_HEADER_BYTES: Final = 64 << 10
#: So many blocks are known at a time, none of them longer than this.
_MOST_KNOWN: Final = 64
_MOST_KNOWN_BYTES: Final = 1024


class HeaderBlocks:
    """The blocks of one connection, each in one frame or in several.

    A client that repeats a request mostly repeats its block, too: as long as that leaves the table as it is, and the
    table is the same, the fields are known.

    Attributes:
        stream: whose block is incomplete; 0 for none.
        ends: the client sends nothing behind that block.
    """

    def __init__(self) -> None:
        self.stream = 0
        self.ends = False
        self._decoder = Decoder(MOST_HEADER_BYTES)
        self._known: dict[bytes, Fields] = {}
        self._block = b""

    def begin(self, stream: int, block: bytes, ends: bool) -> None:
        """Takes the first part of a block."""
        self.stream, self._block, self.ends = stream, block, ends

    def add(self, part: bytes) -> None:
        """Takes a further part.

        Raises:
            ConnectionFault: the block is too long, or its parts are empty.
        """
        self._block += part
        if len(self._block) > MOST_HEADER_BYTES or not part:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"a header block above {MOST_HEADER_BYTES} bytes")

    def take(self) -> bytes:
        """Returns the block that is complete now."""
        block, self._block, self.stream = self._block, b"", 0
        return block

    def fields(self, block: bytes) -> Fields:
        """Returns what a block says; the same object for the same block.

        Raises:
            ConnectionFault: it cannot be decoded.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            fields: Fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"a header block: {error}") from error
        if not leaves_table(block):
            self._known.clear()
        elif len(block) <= _MOST_KNOWN_BYTES:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[block] = fields
        return fields


def leaves_table(block: bytes) -> bool:
    """Returns whether a block that can be decoded leaves the table as it is.

    So do fields of the table and literals without indexing (RFC 7541, sections 6.1, 6.2.2 and 6.2.3).
    """
    place, end = 0, len(block)
    while place < end:
        first = block[place]
        if first & 0x80:
            place = _after_integer(block, place, 0x7F)
        elif first & 0x60:
            return False  # a literal with indexing, or another size of the table
        else:
            place = _after_integer(block, place, 0x0F)
            if not first & 0x0F:
                place = _after_text(block, place)
            place = _after_text(block, place)
    return True


def _after_integer(block: bytes, place: int, prefix: int) -> int:
    """Where an integer ends, whose first byte has the bits of `prefix` for it (RFC 7541, section 5.1)."""
    if block[place] & prefix == prefix:
        place += 1
        while block[place] & 0x80:
            place += 1
    return place + 1


def _after_text(block: bytes, place: int) -> int:
    """Where a string literal ends, which has its length before it (RFC 7541, section 5.2)."""
    length = block[place] & 0x7F
    place += 1
    if length == 0x7F:
        shift = 0
        while True:
            more = block[place]
            place += 1
            length += (more & 0x7F) << shift
            shift += 7
            if not more & 0x80:
                break
    return place + length
