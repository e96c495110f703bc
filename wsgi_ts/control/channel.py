"""Length-prefixed JSON over a Unix socket: how the processes of one server talk about anything but payloads.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON (one object). Used on the supervisor's control
socket, between supervisor and batcher, and between batcher and worker template.

The object `{"ok": text}` with a long text is sent as that text, with the highest bit of the length set: as JSON the
metrics of a server with many models would cost several times what they cost to write.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # some thirty classes, which only few of the processes with a channel have a use for
    from wsgi_ts.control.codec import Message, Messages

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("!I")
#: A frame larger than this is a broken peer, not a message.
MAX_FRAME_BYTES = 16 * 1024 * 1024
#: In a length: the frame is the text of a result.
_IS_TEXT = 1 << 31
#: Texts from here on are sent so, in characters.
_LONG_TEXT = 65536
_RESULT = "ok"


class ChannelClosed(ConnectionError):
    """The other side is gone (EOF, reset), or sent something that is not a frame."""


class Channel:
    """One side of a connected stream socket that carries JSON objects.

    Not thread-safe for two senders or two receivers; one of each may work at the same time.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, so that a selector can wait on the channel."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one object; blocks until the kernel has taken it. Raises ChannelClosed where the peer is gone."""
        result = message.get(_RESULT) if len(message) == 1 else None
        if isinstance(result, str) and len(result) >= _LONG_TEXT:
            payload = result.encode("utf-8", "surrogatepass")
            length = len(payload) | _IS_TEXT
        else:
            payload = json.dumps(message, separators=(",", ":")).encode()
            length = len(payload)
        try:
            self.sock.sendall(_LENGTH.pack(length) + payload)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> dict[str, Any]:
        """Waits for one object; raises ChannelClosed where the peer is gone, and TimeoutError as the socket says."""
        while True:
            message = self._take()
            if message is not None:
                return message
            self._fill()

    def receive_ready(self) -> list[dict[str, Any]]:
        """After the descriptor became readable: reads once and returns all complete objects, possibly none.

        Raises:
            ChannelClosed: the peer is gone and no complete object is left.
        """
        self._fill()
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def receive_messages(self, messages: Messages[Message], sender: str) -> list[Message]:
        """As `receive_ready`, for typed messages: those of another version are told in the log, and left out."""
        received = []
        for frame in self.receive_ready():
            try:
                received.append(messages.decode(frame))
            except ValueError as error:  # UnknownMessage: `decode` raises no other
                log.error("%s from %s: its version does not fit ours", error, sender)
        return received

    def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for the next object, its answer."""
        self.send(message)
        return self.receive()

    def close(self) -> None:
        """Closes the socket; the peer sees EOF."""
        self.sock.close()

    def _fill(self) -> None:
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("end of stream")
        self._buffer += data

    def _take(self) -> dict[str, Any] | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        is_text = bool(length & _IS_TEXT)
        length &= ~_IS_TEXT
        if length > MAX_FRAME_BYTES:
            raise ChannelClosed(f"frame of {length} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        if is_text:
            return {_RESULT: payload.decode("utf-8", "surrogatepass")}
        message = json.loads(payload)
        if not isinstance(message, dict):
            raise ChannelClosed("frame is not an object")
        return message
