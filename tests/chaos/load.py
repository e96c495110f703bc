"""A closed-loop load whose every answer is checked, and the ledger of what the handler was given.

Outcomes of a request: `ok` (200 and the right bytes), `err` (another status), `closed` (the connection ended before or
inside the answer), `hang` (no answer in time), `wrong` (200 with other bytes: never allowed).
"""

from __future__ import annotations

import hashlib
import http.client
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.archives import archive
from support.server import ServerProcess

#: Sizes on both sides of every boundary: inline data, direct receive, page, several pages.
SIZES = (0, 1, 100, 1900, 2047, 2048, 2049, 4096, 4097, 16384, 70000)
HANG_S = 15.0

HANDLER = """
import hashlib, os, time

class Ledger:
    def initialize(self, context):
        path = os.path.join(os.environ["WSGI_TS_LEDGER"], "ledger")
        self.ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def handle(self, data, context):
        bodies = [bytes(row["body"]) for row in data]
        for body in bodies:
            os.write(self.ledger, body[:32] + b"\\n")
        time.sleep(0.001)
        return [body[:32] + hashlib.sha256(body).digest() for body in bodies]
"""


@dataclass(frozen=True)
class Outcome:
    """One request: its nonce, what became of it, when it was sent and answered (monotonic)."""

    nonce: str
    result: str
    status: int
    sent_at: float
    ended_at: float


class Load:
    """Clients that send checked requests until told to stop; a context manager."""

    def __init__(
        self,
        server: ServerProcess,
        model: str = "ledger",
        clients: int = 8,
        seed: int = 1,
        hang_s: float = HANG_S,
        route: str = "predictions",
    ) -> None:
        self._hang_s = hang_s
        self.outcomes: list[Outcome] = []
        self._server = server
        self._path = f"/{route}/{model}"
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(seed * 1000 + number),))
            for number in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self, result: str) -> int:
        """How many requests ended so."""
        return sum(1 for outcome in self.outcomes if outcome.result == result)

    @property
    def summary(self) -> str:
        """All results and statuses, for failure messages."""
        return str(Counter((outcome.result, outcome.status) for outcome in self.outcomes))

    def _client(self, chance: random.Random) -> None:
        connection = self._connect()
        while not self._stop.is_set():
            nonce = chance.randbytes(16).hex()
            body = nonce.encode() + chance.randbytes(chance.choice(SIZES))
            sent_at = time.monotonic()
            try:
                connection.request("POST", self._path, body, {"content-type": "x/y"})
                reply = connection.getresponse()
                answer = reply.read()
            except TimeoutError:
                self._note(nonce, "hang", 0, sent_at)
            except (OSError, http.client.HTTPException):
                self._note(nonce, "closed", 0, sent_at)
                time.sleep(0.01)
            else:
                right = nonce.encode() + hashlib.sha256(body).digest()
                result = "err" if reply.status != 200 else "ok" if answer == right else "wrong"
                self._note(nonce, result, reply.status, sent_at)
                if reply.getheader("connection") != "close":
                    continue
                time.sleep(0.005)
            connection.close()
            connection = self._connect()
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._server.ports["inference"], timeout=self._hang_s)

    def _note(self, nonce: str, result: str, status: int, sent_at: float) -> None:
        self.outcomes.append(Outcome(nonce, result, status, sent_at, time.monotonic()))


def ledger_server(folder: Path, **arguments: Any) -> ServerProcess:
    """A server with the ledger model in its store; its ledger lies in `folder`."""
    store = folder / "store"
    store.mkdir()
    archive(store, "ledger", HANDLER)
    environment = {"WSGI_TS_LEDGER": str(folder)}
    return ServerProcess(store=store, environment=environment, **arguments)


def executions(folder: Path) -> Counter[str]:
    """How often the handler was given each nonce."""
    path = folder / "ledger"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def check(load: Load, folder: Path, allowed_statuses: set[int]) -> None:
    """The invariants that hold whatever was killed: own answers, no hang, each request run at most once."""
    runs = executions(folder)
    assert load.count("wrong") == 0, load.summary
    assert load.count("hang") == 0, load.summary
    statuses = {outcome.status for outcome in load.outcomes if outcome.result == "err"}
    assert statuses <= allowed_statuses, load.summary
    twice = {nonce: count for nonce, count in runs.items() if count > 1}
    assert not twice, f"run more than once: {twice}"
    assert all(runs[outcome.nonce] == 1 for outcome in load.outcomes if outcome.result == "ok")
