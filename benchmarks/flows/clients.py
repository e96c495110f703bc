"""Clients of workflows whose requests are few or large: threads, each with one connection."""

from __future__ import annotations

import http.client
import statistics
import threading
import time
from urllib.parse import urlsplit

from load import memory_mb
from servers import Server

_LIMIT_S = 120.0
_LOOK_S = 0.2


def ask(server: Server, path: str, body: bytes, seconds: float) -> dict[str, float]:
    """One client that asks again and again for so many seconds, at least once.

    Returns:
        `p50_ms` of all requests, how many were `asked`, and how many `failed`: no 200, or another body than theirs.
    """
    took_ms: list[float] = []
    failed = 0
    connection = http.client.HTTPConnection(urlsplit(server.inference).netloc, timeout=_LIMIT_S)
    try:
        end = time.monotonic() + seconds
        while not took_ms or time.monotonic() < end:
            began = time.monotonic()
            connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            reply = connection.getresponse()
            answer = reply.read()
            took_ms.append((time.monotonic() - began) * 1000)
            failed += reply.status != 200 or answer != body
    finally:
        connection.close()
    return {"p50_ms": statistics.median(took_ms), "asked": len(took_ms), "failed": failed}


def most_memory_mb(server: Server, path: str, body: bytes, clients: int, seconds: float) -> float:
    """The most memory that the server's processes take together while so many clients ask."""
    threads = [threading.Thread(target=ask, args=(server, path, body, seconds)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    most = 0.0
    while any(thread.is_alive() for thread in threads):
        most = max(most, memory_mb(server))
        time.sleep(_LOOK_S)
    for thread in threads:
        thread.join()
    return most
