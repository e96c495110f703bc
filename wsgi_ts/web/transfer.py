"""What moves between a connection and its socket; nothing here blocks, and nobody gets more than a turn's share."""

from __future__ import annotations

from wsgi_ts.web.connection import TURN_BYTES, Connection


def send_now(connection: Connection, data: bytes) -> bool:
    """Sends a small answer; returns whether all of it went at once. The rest is queued.

    Raises:
        OSError: the client has gone.
    """
    if connection.out:
        connection.queue(data)
        return False
    try:
        sent = connection.sock.send(data)
    except BlockingIOError:
        sent = 0
    if sent == len(data):
        return True
    connection.queue(memoryview(data)[sent:])
    return False


def send_queued(connection: Connection) -> bool:
    """Sends what the socket takes in one turn; returns whether nothing is left.

    Raises:
        OSError: the client has gone.
    """
    out, sock = connection.out, connection.sock
    room = TURN_BYTES
    while out:
        if room <= 0:
            return False
        parts = connection.next_parts()
        try:
            sent = sock.sendmsg(parts) if len(parts) > 1 else sock.send(parts[0])
        except BlockingIOError:
            return False
        connection.note_sent(sent)
        room -= sent
    return True
