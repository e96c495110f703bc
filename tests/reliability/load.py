"""A closed-loop load whose every answer is checked, and the ledger of what the handler was given.

Results of a request: `ok` (200 and the right bytes), `err` (another status), `refused` (no connection: the server has
taken nothing), `closed` (the connection ended before or inside the answer), `hang` (no answer in time), `wrong` (200
with other bytes: never allowed).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from support.archives import archive
from support.server import ServerProcess

#: Sizes on both sides of every boundary: inline data, direct receive, page, several pages.
SIZES = (0, 1, 100, 1900, 2047, 2048, 2049, 4096, 4097, 16384, 70000)
#: Much longer than anything takes on a busy machine.
HANG_S = 60.0
APPS = Path(__file__).resolve().parent / "apps"
HANDLER = (APPS / "ledger_handler.py").read_text()


class Outcome(NamedTuple):
    """One request: its nonce, what became of it, when it was sent and answered (monotonic).

    `sent_at` is before its first byte leaves, `whole_at` when the kernel has its last one: never, where it has not.
    """

    nonce: str
    result: str
    status: int
    sent_at: float
    ended_at: float
    whole_at: float = math.inf


class Asked(Protocol):
    """Whoever has an inference API."""

    ports: dict[str, int]


class Load:
    """Clients that send checked requests until told to stop; a context manager.

    Args:
        server: who is asked.
        model: the model or workflow that keeps the ledger.
        clients: how many ask at a time.
        seed: of nonces and sizes.
        hang_s: what has no answer after so many seconds hangs.
        route: where models are asked.
        path: in place of route and model.
    """

    def __init__(
        self,
        server: Asked,
        model: str = "ledger",
        clients: int = 8,
        seed: int = 1,
        hang_s: float = HANG_S,
        route: str = "predictions",
        path: str = "",
    ) -> None:
        self._hang_s = hang_s
        self.outcomes: list[Outcome] = []
        self._server = server
        self._path = path or f"/{route}/{model}"
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

    def count(self, *results: str) -> int:
        """How many requests ended so."""
        return sum(1 for outcome in self.outcomes if outcome.result in results)

    @property
    def cut(self) -> int:
        """How many got no answer, since there was nobody to connect to, or the connection ended."""
        return self.count("refused", "closed")

    @property
    def summary(self) -> str:
        """All results and statuses, for failure messages."""
        return str(Counter((outcome.result, outcome.status) for outcome in self.outcomes))

    def _client(self, chance: random.Random) -> None:
        connection = self._connection()
        while not self._stop.is_set():
            nonce = chance.randbytes(16).hex()
            body = nonce.encode() + chance.randbytes(chance.choice(SIZES))
            sent_at, whole_at = time.monotonic(), math.inf
            reached = False
            try:
                if connection.sock is None:
                    connection.connect()
                reached = True
                connection.request("POST", self._path, body, {"content-type": "application/octet-stream"})
                whole_at = time.monotonic()
                reply = connection.getresponse()
                answer = reply.read()
            except TimeoutError:
                self._note(nonce, "hang", 0, sent_at, whole_at)
            except (OSError, http.client.HTTPException):
                self._note(nonce, "closed" if reached else "refused", 0, sent_at, whole_at)
                time.sleep(0.01)
            else:
                right = nonce.encode() + hashlib.sha256(body).digest()
                result = "err" if reply.status != 200 else "ok" if answer == right else "wrong"
                self._note(nonce, result, reply.status, sent_at, whole_at)
                if reply.getheader("connection") != "close":
                    continue
                time.sleep(0.005)
            connection.close()
            connection = self._connection()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._server.ports["inference"], timeout=self._hang_s)

    def _note(self, nonce: str, result: str, status: int, sent_at: float, whole_at: float) -> None:
        self.outcomes.append(Outcome(nonce, result, status, sent_at, time.monotonic(), whole_at))


class LedgerServer(ServerProcess):
    """A server whose model `ledger` writes to the folder `ledger`."""

    ledger: Path


def ledger_server(folder: Path, *, workers: int = 0, batch_size: int = 1, **arguments: Any) -> LedgerServer:
    """A server with the ledger model in its store; its ledger lies in `folder`.

    Args:
        folder: an empty one.
        workers: the server starts with the model and so many workers; 0: the test registers it.
        batch_size: of that.
        arguments: further ones of `ServerProcess`.
    """
    store = folder / "store"
    store.mkdir()
    archive(store, "ledger", HANDLER)
    arguments["environment"] = {"WSGI_TS_LEDGER": str(folder), **arguments.get("environment", {})}
    if workers:
        row = {
            "defaultVersion": True,
            "marName": "ledger.mar",
            "minWorkers": workers,
            "maxWorkers": workers,
            "batchSize": batch_size,
            "maxBatchDelay": 5,
            "responseTimeout": 120,
        }
        arguments["config"] = {"models": json.dumps({"ledger": {"1.0": row}}), **arguments.get("config", {})}
        arguments["arguments"] = ["--models", "ledger=ledger.mar", *arguments.get("arguments", ())]
    server = LedgerServer(store=store, **arguments)
    server.ledger = folder
    return server


def executions(folder: Path) -> Counter[str]:
    """How often the handler was given each nonce."""
    path = folder / "ledger"
    return Counter(path.read_text().split()) if path.exists() else Counter()


class Broken(AssertionError):
    """An invariant does not hold: `what` names it."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"{what}: {detail}")
        self.what = what


def broken(load: Load, folder: Path, allowed_statuses: set[int]) -> list[Broken]:
    """Which invariants do not hold, whatever was killed: own answers, no hang, each request run at most once.

    Args:
        load: one that has ended.
        folder: of its ledger.
        allowed_statuses: those that errors may have.
    """
    runs = executions(folder)
    asked = {outcome.nonce for outcome in load.outcomes}
    statuses = {outcome.status for outcome in load.outcomes if outcome.result == "err"}
    twice = {nonce: count for nonce, count in runs.items() if count > 1 and nonce in asked}
    missing = [outcome.nonce for outcome in load.outcomes if outcome.result == "ok" and runs[outcome.nonce] != 1]
    found = (
        ("wrong answer", load.count("wrong"), load.summary),
        ("hang", load.count("hang"), load.summary),
        ("status", statuses - allowed_statuses, load.summary),
        ("run more than once", twice, str(twice)),
        ("answered but never run", [nonce for nonce in missing if nonce not in twice], str(missing[:3])),
    )
    return [Broken(what, detail) for what, is_broken, detail in found if is_broken]


def check(load: Load, folder: Path, allowed_statuses: set[int]) -> None:
    """Looks for `broken` invariants.

    Raises:
        Broken: the first of them.
    """
    for each in broken(load, folder, allowed_statuses):
        raise each
