"""The gRPC server by itself, with methods of the test, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import pytest
from support.http2 import Answer, Http2Client

from wsgi_ts.dataplane.ledger import Ledger
from wsgi_ts.http2.frames import ErrorCode, Flag, FrameType, frame, window_frame
from wsgi_ts.rpc import messages
from wsgi_ts.rpc.call import Method, RpcCall
from wsgi_ts.rpc.codes import Failure
from wsgi_ts.rpc.port import Port
from wsgi_ts.rpc.serve import RpcServer
from wsgi_ts.rpc.status import StatusCode
from wsgi_ts.rpc.wire import framed

LIMIT = 1 << 20
Message = messages.PredictionsRequest
Response = messages.PredictionResponse


def request(name: str = "x", **fields: Any) -> bytes:
    return framed(bytes(Message(model_name=name, **fields).SerializeToString()))


def responses(body: bytes) -> list[str]:
    """The predictions in a body of messages."""
    found = []
    while body:
        end = 5 + int.from_bytes(body[1:5], "big")
        found.append(Response.FromString(body[5:end]).prediction.decode())
        body = body[end:]
    return found


async def _echo(request: Any, rpc: RpcCall) -> Any:
    return Response(prediction=request.model_name.encode())


async def _fail(request: Any, rpc: RpcCall) -> Any:
    raise Failure(StatusCode.ABORTED, "100 % Größe\nzweite Zeile")


async def _sleep(request: Any, rpc: RpcCall) -> Any:
    await asyncio.sleep(30)


async def _each(requests: AsyncIterator[Any], rpc: RpcCall) -> None:
    async for request in requests:
        await rpc.write(Response(prediction=request.model_name.encode()))


async def _many(request: Any, rpc: RpcCall) -> None:
    for number in range(int(request.model_name)):
        await rpc.write(Response(prediction=b"%d" % number + bytes(50_000)))


async def _metadata(request: Any, rpc: RpcCall) -> Any:
    rpc.trailing_metadata += [("mark", "yes"), ("raw-bin", b"\0\xff")]
    return Response(prediction=repr(sorted(rpc.metadata)).encode())


METHODS = [
    Method("/t.T/Echo", _echo, Message, Response),
    Method("/t.T/Fail", _fail, Message, Response),
    Method("/t.T/Sleep", _sleep, Message, Response),
    Method("/t.T/Metadata", _metadata, Message, Response),
    Method("/t.T/Each", _each, Message, Response, takes_stream=True, answers_stream=True),
    Method("/t.T/Many", _many, Message, Response, answers_stream=True),
]


class Clients:
    """Clients of one port, closed at the end of the test."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._open: list[Http2Client] = []

    async def open(self) -> Http2Client:
        client = await Http2Client.to(self.port)
        self._open.append(client)
        return client

    async def close(self) -> None:
        for client in self._open:
            await client.close()


def run(act: Callable[[RpcServer, Clients], Awaitable[None]], **options: Any) -> None:
    """Does something with a server; all that it has must be over when it stops."""

    async def serve() -> None:
        port = Port(METHODS, LIMIT, **options)
        server = RpcServer(port)
        sock = socket.create_server(("127.0.0.1", 0))
        await server.start(sock, None)
        clients = Clients(sock.getsockname()[1])
        await act(server, clients)
        await clients.close()
        await asyncio.wait_for(server.stop(0.0), 60)
        assert port.calls_under_way == 0
        assert port.received.total == 0

    asyncio.run(serve())


def test_calls_of_one_connection() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        numbers = [client.ask("/t.T/Echo", request(str(each))) for each in range(50)]
        for each, number in enumerate(numbers):
            answer = await client.answer(number)
            assert (answer.fields[":status"], answer.status, responses(answer.body)) == ("200", 0, [str(each)])
            assert answer.fields["content-type"] == "application/grpc"

    run(act)


def test_a_message_in_pieces_and_its_end_apart() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        data = request("in pieces")
        number = client.ask("/t.T/Echo", *(data[at : at + 1] for at in range(len(data))), b"")
        assert responses((await client.answer(number)).body) == ["in pieces"]

    run(act)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)], ids=["gzip", "deflate"]
)
def test_compressed_messages(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()

        async def ask(message: bytes) -> Any:
            data = b"\1" + len(message).to_bytes(4, "big") + message
            return await client.answer(client.ask("/t.T/Echo", data, fields=[("grpc-encoding", encoding)]))

        packed = pack(Message(model_name="packed").SerializeToString())
        assert responses((await ask(packed)).body) == ["packed"]
        assert (await ask(packed[:-6])).status == StatusCode.INTERNAL
        assert (await ask(b"nothing of the kind")).status == StatusCode.INTERNAL
        bomb = await ask(pack(bytes(LIMIT + 1)))
        assert (bomb.status, "larger than max" in bomb.text) == (StatusCode.RESOURCE_EXHAUSTED, True)

    run(act)


def test_what_cannot_be_read_is_refused_with_a_reason() -> None:
    large = b"\0" + (LIMIT + 1).to_bytes(4, "big")
    cases = [
        ((request(), request()), [], StatusCode.INTERNAL, "takes one message"),
        ((), [], StatusCode.INTERNAL, "none has come"),
        ((request()[:-1],), [], StatusCode.INTERNAL, "ends within a message"),
        ((framed(b"\xff\xff"),), [], StatusCode.INTERNAL, "no org.pytorch.serve.grpc.inference.PredictionsRequest"),
        ((large,), [], StatusCode.RESOURCE_EXHAUSTED, f"larger than max ({LIMIT + 1} vs. {LIMIT})"),
        ((b"\1\0\0\0\1x",), [("grpc-encoding", "br")], StatusCode.UNIMPLEMENTED, "compressed as 'br'"),
        ((b"\1\0\0\0\1x",), [], StatusCode.UNIMPLEMENTED, "compressed as 'identity'"),
        ((request(),), [("grpc-timeout", "1 day")], StatusCode.INTERNAL, "no grpc-timeout"),
    ]

    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        for parts, fields, code, text in cases:
            answer = await client.answer(client.ask("/t.T/Echo", *parts, fields=fields))
            assert (answer.status, text in unquote(answer.text)) == (code, True), answer
            assert ("grpc-accept-encoding" in answer.fields) == (code == StatusCode.UNIMPLEMENTED)
        assert (await client.answer(client.ask("/t.T/Nothing", request()))).status == StatusCode.UNIMPLEMENTED
        assert (await client.answer(client.ask("/t.T/Echo", request()))).status == StatusCode.OK

    run(act)


def test_what_is_no_call_at_all() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        for number, fields, status in (
            (1, [(":method", "GET"), (":path", "/t.T/Echo"), (":scheme", "http")], "405"),
            (3, [(":method", "POST"), (":path", "/t.T/Echo"), (":scheme", "http"), ("content-type", "a/b")], "415"),
        ):
            answer = client.answers[number] = Answer()
            client.send(client.head(number, fields, Flag.END_HEADERS | Flag.END_STREAM))
            await client.answer(number)
            assert (answer.fields[":status"], answer.ended) == (status, True)
            assert answer.body.startswith(b"gRPC calls")
        reader, writer = await asyncio.open_connection("127.0.0.1", clients.port)
        writer.write(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
        answer1 = await asyncio.wait_for(reader.read(), 60)
        assert answer1.startswith(b"HTTP/1.1 400 ")
        assert b"This port speaks gRPC" in answer1
        writer.close()

    run(act)


def test_texts_and_metadata() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        failed = await client.answer(client.ask("/t.T/Fail", request()))
        assert failed.status == StatusCode.ABORTED
        assert failed.text == "100 %25 Gr%C3%B6%C3%9Fe%0Azweite Zeile"
        fields = [("authorization", "Bearer k"), ("trace-bin", "AP8"), ("user-agent", "u")]
        told = await client.answer(client.ask("/t.T/Metadata", request(), fields=fields))
        assert responses(told.body) == [repr([("authorization", "Bearer k"), ("trace-bin", b"\0\xff")])]
        assert (told.fields["mark"], told.fields["raw-bin"]) == ("yes", "AP8=")

    run(act)


def test_deadlines_and_cancellation() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        late = await client.answer(client.ask("/t.T/Sleep", request(), fields=[("grpc-timeout", "50m")]))
        assert late.status == StatusCode.DEADLINE_EXCEEDED
        number = client.ask("/t.T/Sleep", request())
        echoed = client.ask("/t.T/Echo", request())
        await client.answer(echoed)
        assert server.port.calls_under_way == 1
        client.send(frame(FrameType.RST_STREAM, 0, number, ErrorCode.CANCEL.to_bytes(4, "big")))
        await client.answer(client.ask("/t.T/Echo", request()))
        assert server.port.calls_under_way == 0
        client.ask("/t.T/Sleep", request())
        await client.answer(client.ask("/t.T/Echo", request()))
        await client.close()
        while server.port.calls_under_way:
            await asyncio.sleep(0.01)

    run(act)


def test_streams_both_ways() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        number = client.ask("/t.T/Each", request("a"), request("b"), ends=False)
        while len(responses(client.answers[number].body)) < 2:
            await client.read()
        client.send(frame(FrameType.DATA, Flag.END_STREAM, number, request("c") + request("d")))
        answer = await client.answer(number)
        assert (responses(answer.body), answer.status) == (["a", "b", "c", "d"], StatusCode.OK)
        none = await client.answer(client.ask("/t.T/Each"))
        assert (none.body, none.status) == (b"", StatusCode.OK)
        many = await client.answer(client.ask("/t.T/Many", request("40")))
        assert [each.rstrip("\0") for each in responses(many.body)] == [str(each) for each in range(40)]

    run(act)


def test_a_slow_reader_waits_alone() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        slow = await clients.open()
        slow.send(frame(FrameType.SETTINGS, 0, 0, b"\0\4" + (1000).to_bytes(4, "big")))
        number = slow.ask("/t.T/Many", request("3"))
        while len(slow.answers[number].body) < 1000:
            await slow.read()
        assert (await client.answer(client.ask("/t.T/Echo", request()))).status == StatusCode.OK
        slow.send(window_frame(number, 1 << 20))
        assert len(responses((await slow.answer(number)).body)) == 3

    run(act)


def test_what_is_being_received_has_a_limit_for_all_together() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        server.port.received = Ledger(90_000)
        client = await clients.open()
        part = b"\0" + (60_000).to_bytes(4, "big") + bytes(16_000)
        numbers = [client.ask("/t.T/Echo", part, ends=False) for _ in range(3)]
        client.send(frame(FrameType.DATA, 0, numbers[1], bytes(16_000)))
        client.send(frame(FrameType.DATA, 0, numbers[1], bytes(16_000)))
        client.send(frame(FrameType.DATA, 0, numbers[0], bytes(16_000)), frame(FrameType.DATA, 0, numbers[0], b"x"))
        ended = await client.answer(numbers[1])
        assert (ended.status, "Too many bytes" in ended.text) == (StatusCode.RESOURCE_EXHAUSTED, True)
        assert not client.answers[numbers[0]].ended
        await client.close()
        while server.port.calls_under_way:
            await asyncio.sleep(0.01)

    run(act)


def test_calls_that_are_reset_at_once_leave_nothing() -> None:
    """Of which one client can send any number in a moment."""

    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        for _ in range(3000):
            number = client.ask("/t.T/Sleep", request())
            client.send(frame(FrameType.RST_STREAM, 0, number, ErrorCode.CANCEL.to_bytes(4, "big")))
        assert (await client.answer(client.ask("/t.T/Echo", request()))).status == StatusCode.OK
        assert server.port.calls_under_way == 0

    run(act)


def test_a_client_that_breaks_the_protocol_costs_its_connection_only() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client, other = await clients.open(), await clients.open()
        number = client.ask("/t.T/Sleep", request())
        client.send(frame(FrameType.PING, 0, 0, b"short"))
        await client.answer(number)
        assert client.goaway == ErrorCode.FRAME_SIZE_ERROR
        assert (await other.answer(other.ask("/t.T/Echo", request()))).status == StatusCode.OK

    run(act)


def test_a_connection_leaves_at_its_age_and_ends_after_the_grace() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client = await clients.open()
        number = client.ask("/t.T/Sleep", request())
        answer = await client.answer(number)
        assert (client.goaway, answer.ended) == (ErrorCode.NO_ERROR, False)
        other = await clients.open()
        assert (await other.answer(other.ask("/t.T/Echo", request()))).status == StatusCode.OK

    run(act, most_age_s=0.2, age_grace_s=0.2)


def test_a_stop_lets_calls_end_and_ends_what_does_not() -> None:
    async def act(server: RpcServer, clients: Clients) -> None:
        client, idle = await clients.open(), await clients.open()
        number = client.ask("/t.T/Sleep", request())
        stream = client.ask("/t.T/Each", request("a"), ends=False)
        while not client.answers[stream].body:
            await client.read()
        stopping = asyncio.create_task(server.stop(1.0))
        while await idle.read():
            pass
        assert idle.goaway == ErrorCode.NO_ERROR
        client.send(frame(FrameType.DATA, Flag.END_STREAM, stream, request("b")))
        ended = await client.answer(stream)
        assert (responses(ended.body), ended.status) == (["a", "b"], StatusCode.OK)
        assert (await client.answer(number)).status == StatusCode.CANCELLED
        await stopping

    run(act)
