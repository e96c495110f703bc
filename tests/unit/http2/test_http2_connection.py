"""The server's side of HTTP/2 by itself: bytes in, events and bytes out. The client is hpack, and frames by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from wsgi_ts.http2.connection import CONNECTION_WINDOW, STREAM_WINDOW, Connection
from wsgi_ts.http2.faults import ConnectionFault
from wsgi_ts.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    LAST_STREAM,
    MOST_WINDOW,
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway_frame,
    header_block,
    settings_frame,
    window_frame,
)
from wsgi_ts.http2.header_blocks import MOST_HEADER_BYTES
from wsgi_ts.http2.outbox import MOST_UNREAD_REPLIES
from wsgi_ts.http2.stream import Event, EventKind, Stream

FIELDS = [(":method", "POST"), (":scheme", "http"), (":path", "/a.B/C"), ("te", "trailers"), ("x", "y")]
BEGIN = PREFACE + settings_frame(())
END = Flag.END_HEADERS | Flag.END_STREAM


class Client:
    """A client that has shaken hands with a connection.

    Attributes:
        connection: the server's side.
        encoder: makes its header blocks.
        frames: what the server has sent, as type, flags, stream and payload.
    """

    def __init__(self, most_streams: int = 100, first: Iterable[tuple[int, int]] = ()) -> None:
        self.connection = Connection(most_streams)
        self.encoder = Encoder()
        self._decoder = Decoder()
        assert self.send(PREFACE, settings_frame(first)) == []
        self.sent()

    def send(self, *frames: bytes) -> list[Event]:
        return self.connection.receive(b"".join(frames))

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """The frames that the server has to send."""
        return split(self.connection.outbox.take())

    def head(self, number: int, flags: int = END, fields: list[tuple[str, str]] | None = None) -> bytes:
        return frame(FrameType.HEADERS, flags, number, self.encoder.encode(fields or FIELDS))

    def request(self, number: int = 1, flags: int = END) -> Stream:
        """Sends a request's head; returns its stream."""
        (event,) = self.send(self.head(number, flags))
        assert event.kind == EventKind.REQUEST
        return event.stream

    def decoded(self, block: bytes) -> list[tuple[str, str]]:
        return [(str(name), str(value)) for name, value in self._decoder.decode(block)]


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    frames = []
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        frames.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]))
        data = data[end:]
    return frames


def told(events: Iterable[Event]) -> list[tuple[int, int, bytes, bool]]:
    return [(each.kind, each.stream.number, each.data, each.ends) for each in events]


def fault_of(client: Client, *frames: bytes) -> int:
    """The code that the connection ends with; the server says it to the client, too."""
    with pytest.raises(ConnectionFault) as caught:
        client.send(*frames)
    kind, _, number, payload = client.sent()[-1]
    assert (kind, number) == (FrameType.GOAWAY, 0)
    assert int.from_bytes(payload[4:8], "big") == caught.value.code
    return caught.value.code


def test_the_handshake() -> None:
    connection = Connection(7)
    first, window = split(connection.outbox.take())
    assert first[0] == FrameType.SETTINGS
    values = {first[3][at + 1]: int.from_bytes(first[3][at + 2 : at + 6], "big") for at in range(0, len(first[3]), 6)}
    assert values[Setting.MAX_CONCURRENT_STREAMS] == 7
    assert values[Setting.INITIAL_WINDOW_SIZE] == STREAM_WINDOW
    assert (window[0], int.from_bytes(window[3], "big")) == (
        FrameType.WINDOW_UPDATE,
        CONNECTION_WINDOW - DEFAULT_WINDOW,
    )
    connection.receive(BEGIN)
    assert split(connection.outbox.take()) == [(FrameType.SETTINGS, Flag.ACK, 0, b"")]


def test_a_request_and_its_answer() -> None:
    client = Client()
    events = client.send(client.head(1, Flag.END_HEADERS), frame(FrameType.DATA, Flag.END_STREAM, 1, b"body"))
    assert told(events) == [(EventKind.REQUEST, 1, b"", False), (EventKind.DATA, 1, b"body", True)]
    assert events[0].fields == [(name.encode(), value.encode()) for name, value in FIELDS]
    connection, stream = client.connection, events[0].stream
    connection.send_head(stream, header_block([(":status", "200"), ("content-type", "x" * 300)]))
    connection.outbox.send_data(stream, b"answer")
    connection.outbox.send_trailers(stream, header_block([("grpc-status", "0")]))
    head, data, trailers = client.sent()
    assert client.decoded(head[3]) == [(":status", "200"), ("content-type", "x" * 300)]
    assert data == (FrameType.DATA, 0, 1, b"answer")
    assert (trailers[1], client.decoded(trailers[3])) == (END, [("grpc-status", "0")])
    assert connection.outbox.streams == {}


def test_equal_heads_are_the_same_object_until_the_table_changes() -> None:
    client = Client()
    first, second, third = (client.send(client.head(number))[0].fields for number in (1, 3, 5))
    assert first == second == third
    assert second is third
    client.send(client.head(7, fields=[*FIELDS, ("new", "entry")]))
    (again,) = client.send(client.head(9))
    assert again.fields == first


def test_the_table_of_headers_is_the_clients() -> None:
    client = Client()
    for number, name in enumerate(("a", "b", "a", "c", "b", "a") * 30):
        fields = [*FIELDS, ("name", name), (name, str(number % 7))]
        (event,) = client.send(client.head(2 * number + 1, fields=fields))
        assert event.fields == [(each.encode(), value.encode()) for each, value in fields]
        client.connection.send_end(event.stream)


@settings(max_examples=60)
@given(st.data())
def test_events_do_not_depend_on_how_the_bytes_come(data: st.DataObject) -> None:
    encoder = Encoder()
    sent = BEGIN
    for number in range(1, data.draw(st.integers(1, 6)) * 2, 2):
        block = encoder.encode(FIELDS)
        cut = data.draw(st.integers(0, len(block) - 1))
        body = data.draw(st.binary(max_size=40))
        if cut:
            sent += frame(FrameType.HEADERS, 0, number, block[:cut])
            sent += frame(FrameType.CONTINUATION, Flag.END_HEADERS, number, block[cut:])
        else:
            sent += frame(FrameType.HEADERS, Flag.END_HEADERS, number, block)
        sent += frame(FrameType.PING, 0, 0, b"12345678")
        sent += frame(FrameType.DATA, Flag.PADDED, number, b"\2" + body + b"\0\0")
        sent += frame(FrameType.DATA, Flag.END_STREAM, number, b"")
    whole, parts = Connection(10), Connection(10)
    expected = told(whole.receive(sent))
    found = []
    rest = sent
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += told(parts.receive(rest[:size]))
        rest = rest[size:]
    assert found == expected
    assert parts.outbox.take() == whole.outbox.take()


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=30)), max_size=20)
)
def test_any_frames_are_events_or_a_fault(frames: list[tuple[int, int, int, bytes]]) -> None:
    client = Client()
    client.request()
    try:
        client.send(*(frame(*each) for each in frames))
    except ConnectionFault as fault:
        assert fault.code != ErrorCode.NO_ERROR
    split(client.connection.outbox.take())


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_events_or_a_fault(data: bytes) -> None:
    connection = Connection(3)
    try:
        connection.receive(BEGIN + data)
    except ConnectionFault as fault:
        assert fault.code != ErrorCode.NO_ERROR


# What breaks the protocol


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\0" * 30, PREFACE[:-1] + b"x"])
def test_who_does_not_speak_http2(data: bytes) -> None:
    with pytest.raises(ConnectionFault):
        Connection(1).receive(data)


def test_the_first_frame_is_settings() -> None:
    with pytest.raises(ConnectionFault, match="SETTINGS"):
        Connection(1).receive(PREFACE + frame(FrameType.PING, 0, 0, bytes(8)))


BROKEN = {
    "data on no stream": (frame(FrameType.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on an idle stream": (frame(FrameType.DATA, 0, 5, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data after the end": (frame(FrameType.DATA, 0, 1, b"x"), ErrorCode.STREAM_CLOSED),
    "too much padding": (frame(FrameType.DATA, Flag.PADDED, 1, b"\4abc"), ErrorCode.PROTOCOL_ERROR),
    "a head on an even stream": (frame(FrameType.HEADERS, END, 2, b"\x82"), ErrorCode.PROTOCOL_ERROR),
    "a head after the end": (frame(FrameType.HEADERS, END, 1, b"\x82"), ErrorCode.STREAM_CLOSED),
    "a head that cannot be decoded": (frame(FrameType.HEADERS, END, 3, b"\xfe"), ErrorCode.COMPRESSION_ERROR),
    "a head that depends on itself": (
        frame(FrameType.HEADERS, END | Flag.PRIORITY, 3, b"\0\0\0\3\0\x82"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a head without room for its priority": (
        frame(FrameType.HEADERS, END | Flag.PRIORITY, 3, b"\0\0"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a continuation of nothing": (frame(FrameType.CONTINUATION, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    "a frame inside of a header block": (
        frame(FrameType.HEADERS, 0, 3, b"\x82") + frame(FrameType.PING, 0, 0, bytes(8)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a push": (frame(FrameType.PUSH_PROMISE, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "a short ping": (frame(FrameType.PING, 0, 0, b"x"), ErrorCode.FRAME_SIZE_ERROR),
    "a ping on a stream": (frame(FrameType.PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "a goaway on a stream": (frame(FrameType.GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "settings on a stream": (frame(FrameType.SETTINGS, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "settings of an odd length": (frame(FrameType.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (frame(FrameType.SETTINGS, Flag.ACK, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR),
    "an impossible window": (
        settings_frame([(Setting.INITIAL_WINDOW_SIZE, MOST_WINDOW + 1)]),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "frames too small": (settings_frame([(Setting.MAX_FRAME_SIZE, 100)]), ErrorCode.PROTOCOL_ERROR),
    "a strange push setting": (settings_frame([(Setting.ENABLE_PUSH, 2)]), ErrorCode.PROTOCOL_ERROR),
    "no more window": (window_frame(0, 0), ErrorCode.FLOW_CONTROL_ERROR),
    "too much window": (window_frame(0, MOST_WINDOW), ErrorCode.FLOW_CONTROL_ERROR),
    "a window of an idle stream": (window_frame(9, 1), ErrorCode.PROTOCOL_ERROR),
    "a short window": (frame(FrameType.WINDOW_UPDATE, 0, 0, b"x"), ErrorCode.FRAME_SIZE_ERROR),
    "a reset of an idle stream": (frame(FrameType.RST_STREAM, 0, 9, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "a short reset": (frame(FrameType.RST_STREAM, 0, 1, b"x"), ErrorCode.FRAME_SIZE_ERROR),
    "a frame that is too long": (
        frame(FrameType.DATA, 0, 1, bytes(DEFAULT_FRAME_BYTES + 1)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
}


@pytest.mark.parametrize(("data", "code"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_protocol(data: bytes, code: int) -> None:
    client = Client()
    client.request()
    assert fault_of(client, data) == code


def test_trailers_end_the_request() -> None:
    client = Client()
    client.request(flags=Flag.END_HEADERS)
    assert told(client.send(client.head(1, fields=[("x", "y")]))) == [(EventKind.DATA, 1, b"", True)]
    client.request(3, Flag.END_HEADERS)
    assert fault_of(client, client.head(3, Flag.END_HEADERS, [("x", "y")])) == ErrorCode.PROTOCOL_ERROR


def test_what_is_unknown_or_without_effect_is_ignored() -> None:
    client = Client()
    unknown = frame(0x77, 0xFF, 3, b"anything")
    priority = frame(FrameType.PRIORITY, 0, 5, bytes(5))
    setting = settings_frame([(0x99, 1), (Setting.HEADER_TABLE_SIZE, 0)])
    assert client.send(unknown, priority, setting, goaway_frame(0, 0), window_frame(0, 5)) == []


# Limits of what a client may have kept for it


def test_a_header_block_has_a_limit() -> None:
    client = Client()
    client.send(frame(FrameType.HEADERS, 0, 1, b"\x82"))
    rest = frame(FrameType.CONTINUATION, 0, 1, bytes(DEFAULT_FRAME_BYTES))
    assert fault_of(client, *[rest] * (MOST_HEADER_BYTES // DEFAULT_FRAME_BYTES)) == ErrorCode.ENHANCE_YOUR_CALM


def test_fields_have_a_limit_however_short_they_are_sent() -> None:
    client = Client()
    client.send(client.head(1, fields=[*FIELDS, ("long", "x" * 4000)]))
    bomb = client.encoder.encode([("long", "x" * 4000)]) * 40
    assert fault_of(client, frame(FrameType.HEADERS, END, 3, bomb)) == ErrorCode.COMPRESSION_ERROR


def test_streams_have_a_limit() -> None:
    client = Client(most_streams=2)
    client.request(1)
    client.request(3)
    assert client.send(client.head(5)) == []
    refused = ErrorCode.REFUSED_STREAM.to_bytes(4, "big")
    assert client.sent() == [(FrameType.RST_STREAM, 0, 5, refused)]
    client.send(frame(FrameType.RST_STREAM, 0, 1, bytes(4)))
    client.request(7)


def test_answers_that_are_never_read_have_a_limit() -> None:
    client = Client()
    ping = frame(FrameType.PING, 0, 0, bytes(8))
    with pytest.raises(ConnectionFault):
        client.send(ping * (MOST_UNREAD_REPLIES // len(ping) + 1))


def test_the_windows_of_what_is_received() -> None:
    client = Client()
    stream = client.request(flags=Flag.END_HEADERS)
    data = frame(FrameType.DATA, 0, 1, bytes(DEFAULT_FRAME_BYTES))
    for _ in range(STREAM_WINDOW // DEFAULT_FRAME_BYTES):
        client.send(data)
    assert fault_of(client, data) == ErrorCode.FLOW_CONTROL_ERROR
    client = Client()
    stream = client.request(flags=Flag.END_HEADERS)
    more = 0
    for _ in range(4 * CONNECTION_WINDOW // DEFAULT_FRAME_BYTES):
        client.send(data)
        client.connection.taken(stream, DEFAULT_FRAME_BYTES)
        more += sum(int.from_bytes(each[3], "big") for each in client.sent() if each[2] == 1)
    assert 4 * CONNECTION_WINDOW - more < STREAM_WINDOW


def test_padding_and_data_that_nobody_wants_are_given_back() -> None:
    client = Client()
    client.request(flags=Flag.END_HEADERS)
    padded = frame(FrameType.DATA, Flag.PADDED, 1, b"\xff" + bytes(255))
    for _ in range(2 * STREAM_WINDOW // 256):
        assert told(client.send(padded)) == [(EventKind.DATA, 1, b"", False)]
        client.connection.taken(client.connection.outbox.streams[1], 0)
    client.connection.reset(client.connection.outbox.streams[1], ErrorCode.CANCEL)
    data = frame(FrameType.DATA, 0, 1, bytes(DEFAULT_FRAME_BYTES))
    for _ in range(2 * CONNECTION_WINDOW // DEFAULT_FRAME_BYTES):
        assert client.send(data) == []


# Windows of what is sent


def data_of(frames: Iterable[tuple[int, int, int, bytes]], number: int) -> bytes:
    return b"".join(payload for kind, _, stream, payload in frames if (kind, stream) == (FrameType.DATA, number))


def test_an_answer_waits_for_the_windows() -> None:
    client = Client(first=[(Setting.INITIAL_WINDOW_SIZE, 10)])
    connection, stream = client.connection, client.request()
    connection.outbox.send_data(stream, b"0123456789abcdef")
    connection.outbox.send_data(stream, b"ghi")
    assert data_of(client.sent(), 1) == b"0123456789"
    assert sum(map(len, stream.unsent)) == 9
    assert client.send(window_frame(1, 8)) == []
    assert data_of(client.sent(), 1) == b"abcdefgh"
    assert told(client.send(window_frame(1, 100))) == [(EventKind.SENT, 1, b"", False)]
    assert data_of(client.sent(), 1) == b"i"
    connection.outbox.send_data(stream, b"x" * 200)
    connection.outbox.send_trailers(stream, b"\x88")
    assert client.send(settings_frame([(Setting.INITIAL_WINDOW_SIZE, 1000)])) == []
    frames = client.sent()
    assert len(data_of(frames, 1)) == 200
    assert frames[-1][:2] == (FrameType.HEADERS, END)
    assert connection.outbox.streams == {}


def test_the_connections_window_is_shared() -> None:
    client = Client(first=[(Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
    first, second = client.request(1), client.request(3)
    client.connection.outbox.send_data(first, bytes(DEFAULT_WINDOW - 1))
    client.connection.outbox.send_data(second, b"ab")
    frames = client.sent()
    assert len(data_of(frames, 1)) == DEFAULT_WINDOW - 1
    assert data_of(frames, 3) == b"a"
    assert told(client.send(window_frame(0, 1))) == [(EventKind.SENT, 3, b"", False)]
    assert data_of(client.sent(), 3) == b"b"


def test_frames_are_as_long_as_the_client_takes_them() -> None:
    client = Client(first=[(Setting.INITIAL_WINDOW_SIZE, 1 << 20)])
    client.send(window_frame(0, 1 << 20))
    client.connection.outbox.send_data(client.request(1), bytes(40_000))
    assert [len(each[3]) for each in client.sent()] == [16384, 16384, 7232]
    client.send(settings_frame([(Setting.MAX_FRAME_SIZE, 40_000)]))
    client.sent()
    client.connection.outbox.send_data(client.request(3), bytes(40_000))
    assert [len(each[3]) for each in client.sent()] == [40_000]


def test_a_socket_that_takes_nothing_holds_answers_back() -> None:
    client = Client()
    stream = client.request()
    client.connection.outbox.is_blocked = True
    client.connection.outbox.send_data(stream, b"answer")
    assert client.send(window_frame(0, 9)) == []
    assert client.sent() == []
    client.connection.outbox.is_blocked = False
    events: list[Event] = []
    client.connection.outbox.go_on(events)
    assert told(events) == [(EventKind.SENT, 1, b"", False)]
    assert data_of(client.sent(), 1) == b"answer"


@pytest.mark.parametrize(("more", "code"), [(0, ErrorCode.PROTOCOL_ERROR), (MOST_WINDOW, ErrorCode.FLOW_CONTROL_ERROR)])
def test_an_impossible_window_of_a_stream_costs_the_stream(more: int, code: int) -> None:
    client = Client()
    client.request()
    assert told(client.send(window_frame(1, more))) == [(EventKind.RESET, 1, b"", False)]
    assert client.sent() == [(FrameType.RST_STREAM, 0, 1, code.to_bytes(4, "big"))]
    client.request(3)


# Ends


def test_an_answer_before_the_end_of_the_request_ends_that_too() -> None:
    client = Client()
    stream = client.request(flags=Flag.END_HEADERS)
    client.connection.outbox.send_trailers(stream, b"\x88")
    assert [each[:3] for each in client.sent()] == [(FrameType.HEADERS, END, 1), (FrameType.RST_STREAM, 0, 1)]
    assert client.send(frame(FrameType.DATA, Flag.END_STREAM, 1, b"on the way")) == []


def test_what_the_client_resets_is_sent_no_more() -> None:
    client = Client(first=[(Setting.INITIAL_WINDOW_SIZE, 1)])
    stream = client.request()
    client.connection.outbox.send_data(stream, b"answer")
    client.sent()
    assert told(client.send(frame(FrameType.RST_STREAM, 0, 1, bytes(4)))) == [(EventKind.RESET, 1, b"", False)]
    assert client.send(window_frame(1, 100), window_frame(0, 100)) == []
    assert client.sent() == []


def test_going_away() -> None:
    client = Client()
    connection = client.connection
    connection.go_away(LAST_STREAM)
    connection.ping()
    stream = client.request(1)
    assert [each[0] for each in client.sent()] == [FrameType.GOAWAY, FrameType.PING]
    client.send(frame(FrameType.PING, Flag.ACK, 0, bytes(8)))
    assert connection.pings_answered == 1
    connection.go_away()
    assert client.sent() == [(FrameType.GOAWAY, 0, 0, b"\0\0\0\1" + bytes(4))]
    assert client.send(client.head(3)) == []
    assert client.sent()[0][0] == FrameType.RST_STREAM
    connection.outbox.send_trailers(stream, b"\x88")
    assert client.sent()[0][:3] == (FrameType.HEADERS, END, 1)
