"""Clients that only growth needs: connections on which nothing happens, and many streams read at the same time."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from servers import BenchmarkError, Server

from growth.ticks_handler import CHUNK, STEP_S

_WARM_UP_S = 1.0
#: Once in each chunk and not in what frames it; one that is cut in two, which is rare, is missed.
_MARK = CHUNK[-3:].encode()
#: Descriptors that this process needs besides those of its connections.
_OTHER_FILES = 200
#: How long an answer, or the next chunk of a stream, may take.
_LIMIT_S = 30.0


@contextmanager
def idle_connections(server: Server, count: int) -> Iterator[None]:
    """So many keep-alive connections, each of which has had an answer, open and silent.

    Raises:
        BenchmarkError: this process may not open so many files, or the server does not answer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise BenchmarkError(f"{count} connections need {needed} open files, and {hard} are allowed (ulimit -Hn).")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    address = urlsplit(server.inference)
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection((address.hostname, address.port or 80), timeout=_LIMIT_S)
            opened.append(connection)
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: benchmark\r\n\r\n")
            if not connection.recv(4096).startswith(b"HTTP/1.1 200 "):
                raise BenchmarkError(f"connection {len(opened)} of {count} got no 200")
        yield
    except OSError as error:
        raise BenchmarkError(f"connection {len(opened)} of {count}: {error}") from error
    finally:
        for connection in opened:
            connection.close()


def read_streams(server: Server, model: str, count: int, seconds: float) -> dict[str, float]:
    """Reads so many endless streams of `ticks_handler` at the same time.

    Returns:
        `per_second`, chunks of all streams; `p50_ms` and `p99_ms`, how much later than the pace says a chunk came after
        the one before it.

    Raises:
        BenchmarkError: a stream ended, or came not at all.
    """
    try:
        found = asyncio.run(_read_all(server, model, count, seconds))
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
        raise BenchmarkError(f"{model}: one of {count} streams broke off: {error!r}") from error
    late = sorted(max(0.0, gap - STEP_S) for gaps, _ in found for gap in gaps)
    if not late:
        raise BenchmarkError(f"{model}: no chunks came within {seconds:g} s: give it more time (--seconds)")
    return {
        "per_second": sum(chunks for _, chunks in found) / seconds,
        "p50_ms": late[len(late) // 2] * 1e3,
        "p99_ms": late[min(int(0.99 * len(late)), len(late) - 1)] * 1e3,
    }


async def _read_all(server: Server, model: str, count: int, seconds: float) -> list[tuple[list[float], int]]:
    begins = time.monotonic() + _WARM_UP_S
    return await asyncio.gather(*(_read_one(server, model, begins, begins + seconds) for _ in range(count)))


async def _read_one(server: Server, model: str, begins: float, ends: float) -> tuple[list[float], int]:
    """The times between the chunks of one stream, in seconds, and how many chunks came."""
    address = urlsplit(server.inference)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = f"POST /predictions/{model} HTTP/1.1\r\nHost: benchmark\r\nContent-Length: 1\r\n\r\nx"
        writer.write(head.encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _LIMIT_S)
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise BenchmarkError(f"{model}: a stream was refused: {answer[:200]!r}")
        gaps: list[float] = []
        chunks, last = 0, 0.0
        while (now := time.monotonic()) < ends:
            data = await asyncio.wait_for(reader.read(65536), _LIMIT_S)
            if not data:
                raise BenchmarkError(f"{model}: a stream ended by itself")
            now = time.monotonic()
            came = data.count(_MARK)
            if begins <= now < ends:
                chunks += came
                if last >= begins and came:
                    gaps.append(now - last)
            if came:
                last = now
        return gaps, chunks
    finally:
        writer.close()
