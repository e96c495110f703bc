"""A connection by itself: bytes in, bytes out, and no socket."""

from __future__ import annotations

from typing import Any

import pytest

from wsgi_ts.batcher.shm.request_codec import Answer
from wsgi_ts.http.head import BadHead
from wsgi_ts.web.connection import TURN_BYTES, Connection, Phase, SlotBody

HEAD = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


class NoSocket:
    """All that a connection may ask of its socket."""

    def fileno(self) -> int:
        return 7


@pytest.fixture
def connection() -> Connection:
    sock: Any = NoSocket()
    endpoint: Any = None
    return Connection(sock, "/unix", endpoint)


def sent(connection: Connection) -> bytes:
    """All that is to be sent."""
    data = b"".join(connection.out)
    connection.note_sent(len(data))
    assert connection.unsent == 0
    assert not connection.out
    return data


def test_heads_are_taken_one_by_one_however_they_come(connection: Connection) -> None:
    found = []
    for byte in b"\r\n" + HEAD % 1 + HEAD % 2:
        connection.buffer += bytes((byte,))
        head = connection.next_head() if connection.buffer else None
        if head is not None:
            found.append(head.path)
    assert found == ["/1", "/2"]
    connection.buffer = HEAD % 3 + HEAD % 4
    assert [connection.next_head().path for _ in range(2)] == ["/3", "/4"]  # type: ignore[union-attr]


def test_what_cannot_become_a_head_is_said_at_once(connection: Connection) -> None:
    connection.buffer = b"GET / HTTP/1.1\n"
    with pytest.raises(BadHead):
        connection.next_head()


@pytest.mark.parametrize(
    ("method", "version", "body"),
    [
        ("GET", "1.1", b"transfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        ("HEAD", "1.1", b"transfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n"),
        ("GET", "1.0", b"connection: close\r\n\r\nabc"),
    ],
)
def test_a_streamed_answer_is_framed_as_its_client_can_read_it(
    connection: Connection, method: str, version: str, body: bytes
) -> None:
    connection.buffer = f"{method} / HTTP/{version}\r\nHost: x\r\n\r\n".encode()
    connection.head = connection.next_head()
    connection.begin_stream(Answer())
    assert connection.phase == Phase.STREAM
    connection.queue_chunk(b"abc")
    connection.end_stream()
    assert sent(connection) == b"HTTP/1.1 200 \r\n" + body


def test_what_was_sent_in_part_goes_on_where_it_stopped(connection: Connection) -> None:
    connection.queue(b"abc")
    connection.queue(b"")
    connection.queue(memoryview(b"defg"))
    connection.note_sent(5)
    assert sent(connection) == b"fg"


def test_room_for_a_body_grows_with_what_has_come() -> None:
    body = SlotBody(10 * TURN_BYTES, 0)
    assert body.next_room(reserved=0) == 65536
    body.received = 65536
    assert body.next_room(reserved=0) == 2 * 65536
    body.received = 4 * TURN_BYTES
    assert body.next_room(reserved=0) == 5 * TURN_BYTES
    assert body.next_room(reserved=8 * TURN_BYTES) == 8 * TURN_BYTES
    assert body.next_room(reserved=20 * TURN_BYTES) == 10 * TURN_BYTES


def test_a_request_leaves_nothing_to_the_next(connection: Connection) -> None:
    connection.buffer = HEAD % 1
    connection.head, connection.request_id, connection.arrival_ns = connection.next_head(), "id", 5
    connection.next_request()
    assert (connection.head, connection.request_id, connection.arrival_ns, connection.slot) == (None, "", 0, -1)
