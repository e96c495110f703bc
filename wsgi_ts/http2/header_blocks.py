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
_KNOWN_HEADS: Final = 64


class HeaderBlocks:
    """The blocks of one connection, each in one frame or in several.

    A client that repeats a request mostly repeats its block, too: as long as that only names entries of the table, and
    the table is the same, the fields are known.

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
        # Each byte is a whole reference to the table, so the block leaves the table as it is.
        only_names = bool(block) and min(block) > 0x80 and 0xFF not in block
        try:
            fields: Fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"a header block: {error}") from error
        if only_names and len(self._known) < _KNOWN_HEADS:
            self._known[block] = fields
        elif not only_names:
            self._known.clear()
        return fields
