"""One rank that gets its requests as TorchServe sends them: a stand-in for that transport, and for nothing else.

`python frame_rank.py PATH` connects to a Unix socket, reads commands `I` in TorchServe's frames, and answers each with
the monotonic time (64-bit, ns) at which the request's value was complete in this process's memory. The value is
received straight into its place, which is quicker than the worker of TorchServe, that adds up pieces.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

_INT = struct.Struct("!i")
_TIME = struct.Struct("!q")


class Closed(Exception):
    """The other side has closed the connection."""


def encode_request(body: bytes) -> bytes:
    """The frame of a batch of one request, as a server sends it to each rank."""

    def text(value: bytes) -> bytes:
        return _INT.pack(len(value)) + value

    end = _INT.pack(-1)
    headers = text(b"content-type") + text(b"application/octet-stream") + end
    parameter = text(b"body") + text(b"application/octet-stream") + text(body) + end
    return b"I" + text(b"11111111-2222-3333-4444-555555555555") + headers + parameter + end


def read(connection: socket.socket, size: int) -> bytearray:
    """So many bytes.

    Raises:
        Closed: the connection ended before.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise Closed
        view = view[count:]
    return data


def read_text(connection: socket.socket) -> bytearray | None:
    """A length and so many bytes; None for the length -1, which ends a list."""
    length = int(_INT.unpack(read(connection, _INT.size))[0])
    return None if length == -1 else read(connection, length)


def read_batch(connection: socket.socket) -> list[bytearray]:
    """The values of all parameters of a batch.

    Raises:
        Closed: there is no further batch.
    """
    values = []
    read(connection, 1)
    while read_text(connection) is not None:
        while read_text(connection) is not None:
            read_text(connection)
        while read_text(connection) is not None:
            read_text(connection)
            values.append(read_text(connection) or bytearray())
    return values


def main() -> None:
    """Serves one connection until it ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        try:
            while True:
                values = read_batch(connection)
                arrived = time.monotonic_ns()
                connection.sendall(_TIME.pack(arrived))
                del values
        except Closed:
            return


if __name__ == "__main__":
    main()
