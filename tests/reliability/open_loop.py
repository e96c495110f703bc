"""Requests at a rate that does not heed the answers: what a server does when more comes than it can do."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field
from typing import NamedTuple

#: Requests that have no answer so long after the last one was sent never get one.
LAST_ANSWER_S = 15.0


class Reply(NamedTuple):
    """One answer; seconds since the run began, and what Retry-After says, -1 where it is missing."""

    sent_at: float
    ended_at: float
    status: int
    retry_after: int


@dataclass
class Run:
    """What became of the requests.

    Attributes:
        seconds: for how long they were sent.
        replies: those that have been answered.
        sent: how many were sent.
        wrong: answers that are not the request's own.
    """

    seconds: float
    replies: list[Reply] = field(default_factory=list)
    sent: int = 0
    wrong: int = 0

    def goodput(self, from_s: float = 0.0) -> float:
        """Good answers a second, from a moment on to the end of the sending."""
        good = [each for each in self.replies if each.status == 200 and from_s <= each.ended_at <= self.seconds]
        return len(good) / (self.seconds - from_s)

    def latencies(self, *, good: bool) -> list[float]:
        """Of the good answers, or of the refusals; ascending."""
        return sorted(each.ended_at - each.sent_at for each in self.replies if (each.status == 200) == good)


class _Client:
    """Sends at a rate, on as many kept-alive connections as that takes."""

    def __init__(self, port: int, path: str, rate: float, seconds: float) -> None:
        self._port = port
        self._path = path
        self._rate = rate
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.run = Run(seconds)

    async def send_all(self) -> Run:
        tasks: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()
        count = int(self._rate * self.run.seconds)
        for number in range(count):
            due = self._began + number / self._rate
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            task = asyncio.create_task(self._one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        self.run.sent = count
        if tasks:
            _, late = await asyncio.wait(set(tasks), timeout=LAST_ANSWER_S)
            for each in late:
                each.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for _, writer in self._idle:
            writer.close()
        return self.run

    async def _one(self) -> None:
        body = secrets.token_hex(16).encode() + b"x" * 100
        sent_at = time.monotonic() - self._began
        writer = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            if self._idle:
                reader, writer = self._idle.pop()
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            head = f"POST {self._path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
            writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            status, headers, answer = await _read_answer(reader)
            self.run.wrong += status == 200 and not answer.startswith(body[:32])
            ended_at = time.monotonic() - self._began
            self.run.replies.append(Reply(sent_at, ended_at, status, int(headers.get("retry-after", "-1"))))
            if headers.get("connection") != "close":
                self._idle.append((reader, writer))
                return
        if writer is not None:
            writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers, body


def send(port: int, path: str, rate: float, seconds: float) -> Run:
    """Sends requests at a rate, in parallel as far as that takes; returns when the last one is answered.

    Args:
        port: of the inference API.
        path: of the ledger.
        rate: requests a second.
        seconds: for how long.
    """
    return asyncio.run(_Client(port, path, rate, seconds).send_all())
