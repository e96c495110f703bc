"""A client of HTTP/2 by hand: header blocks of the library hpack, and frames as the test wants them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from hpack import Decoder, Encoder

from wsgi_ts.http2.frames import PREFACE, Flag, FrameType, frame, settings_frame, window_frame

GRPC_FIELDS = [(":method", "POST"), (":scheme", "http"), ("content-type", "application/grpc"), ("te", "trailers")]
#: Flags of a head without a body, and of a whole head.
END = Flag.END_HEADERS | Flag.END_STREAM


def split(data: bytes) -> tuple[list[tuple[int, int, int, bytes]], bytes]:
    """The whole frames at the beginning of bytes, as type, flags, stream and payload; and the rest."""
    frames = []
    while len(data) >= 9 and len(data) >= (end := 9 + int.from_bytes(data[:3], "big")):
        frames.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]))
        data = data[end:]
    return frames, data


@dataclass
class Answer:
    """What has come on a stream."""

    fields: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        """gRPC's code; -1 where there is none."""
        return int(self.fields.get("grpc-status", -1))

    @property
    def text(self) -> str:
        """gRPC's text, as it is sent."""
        return self.fields.get("grpc-message", "")


class Http2Client:
    """A connection whose windows are wide open; use `Http2Client.to`.

    Attributes:
        answers: by stream.
        goaway: the code of the server's last GOAWAY; None before.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._encoder, self._decoder = Encoder(), Decoder()
        self._rest = b""
        self._next = -1
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        wide = settings_frame([(4, 1 << 30)])
        self.send(PREFACE, wide, window_frame(0, 1 << 30))

    @classmethod
    async def to(cls, port: int) -> Http2Client:
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, *frames: bytes) -> None:
        """Sends frames."""
        self.writer.write(b"".join(frames))

    def head(self, number: int, fields: Iterable[tuple[str, str]], flags: int = Flag.END_HEADERS) -> bytes:
        """The frame of a header block."""
        return frame(FrameType.HEADERS, flags, number, self._encoder.encode(list(fields)))

    def ask(self, path: str, *parts: bytes, fields: Iterable[tuple[str, str]] = (), ends: bool = True) -> int:
        """Sends a request; returns its stream."""
        self._next += 2
        number = self._next
        self.answers[number] = Answer()
        last = len(parts) - 1 if ends else -1
        self.send(
            self.head(
                number, [*GRPC_FIELDS, (":path", path), *fields], END if ends and not parts else Flag.END_HEADERS
            ),
            *(frame(FrameType.DATA, int(at == last), number, part) for at, part in enumerate(parts)),
        )
        return number

    async def answer(self, number: int) -> Answer:
        """Waits for the end of an answer, or of the connection."""
        answer = self.answers[number]
        while not answer.ended and answer.reset is None and await self.read():
            pass
        return answer

    async def read(self) -> bool:
        """Takes what comes next; False at the end of the connection."""
        data = await asyncio.wait_for(self._reader.read(1 << 16), 60)
        frames, self._rest = split(self._rest + data)
        for kind, flags, number, payload in frames:
            self._on_frame(kind, flags, number, payload)
        return bool(data)

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == FrameType.GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == FrameType.PING and not flags:
            self.send(frame(FrameType.PING, Flag.ACK, 0, payload))
        if number not in self.answers:
            return
        answer = self.answers[number]
        if kind == FrameType.HEADERS:
            answer.fields.update((str(name), str(value)) for name, value in self._decoder.decode(payload))
        elif kind == FrameType.DATA:
            answer.body += payload
        elif kind == FrameType.RST_STREAM:
            answer.reset = int.from_bytes(payload, "big")
        answer.ended = answer.ended or (kind in (FrameType.HEADERS, FrameType.DATA) and bool(flags & Flag.END_STREAM))

    async def close(self) -> None:
        """Ends the connection."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
