"""One bad request in a batch, for a handler that may be called again for the same requests (`maxExecutions`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

pytestmark = pytest.mark.chaos

#: Notes what it is given, one line an execution; does what the worst request of its batch says.
HANDLER = """
import os, time

def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(row["body"]).decode() for row in data]
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND)
    os.write(ledger, (",".join(bodies) + "\\n").encode())
    os.close(ledger)
    if any(body.startswith("hold") for body in bodies):
        while os.path.exists(os.environ["LEDGER"] + ".hold"):
            time.sleep(0.01)
    if any(body.startswith("fails") for body in bodies):
        raise ValueError("no")
    if any(body.startswith("short") for body in bodies):
        return bodies[1:]
    if any(body.startswith("crashes") for body in bodies):
        os.abort()
    if any(body.startswith("hangs") for body in bodies):
        time.sleep(60)
    if sum(body.startswith("large") for body in bodies) > 2:
        raise MemoryError
    return bodies
"""
BATCH = 8


class Place:
    """A server, and the ledger of what its handlers were given."""

    def __init__(self, server: ServerProcess, ledger: Path) -> None:
        self.server = server
        self.ledger = ledger
        self.hold = ledger.with_name(ledger.name + ".hold")
        self.number = 0

    def ask(self, model: str, body: str) -> http.Reply:
        headers = {"content-type": "application/octet-stream"}
        return self.server.request(
            "inference", "POST", f"/predictions/{model}", headers=headers, body=body, timeout=120
        )

    def batch(self, model: str, *bodies: str) -> tuple[list[http.Reply], list[list[str]]]:
        """Asks all of these at once, while the worker has something else to do.

        Returns:
            The answers, and the batches that the handler was given.
        """
        self.number += 1
        self.ledger.write_text("")
        self.hold.touch()
        names = [f"{body} {self.number}.{place}" for place, body in enumerate(bodies)]
        with ThreadPoolExecutor(len(names) + 1) as pool:
            first = pool.submit(self.ask, model, "hold")
            eventually(lambda: "hold" in self.ledger.read_text(), within=20, what="the handler at work")
            asked = [pool.submit(self.ask, model, name) for name in names]
            eventually(lambda: self.waiting(model) == len(names), within=20, what="the requests in the queue")
            self.hold.unlink()
            replies = [each.result() for each in asked]
            assert first.result().status == 200
        batches = [line.split(",") for line in self.ledger.read_text().splitlines()[1:]]
        for name, reply in zip(names, replies, strict=True):
            assert reply.status != 200 or reply.text == name
        return replies, [[name.partition(" ")[0] for name in batch] for batch in batches]

    def waiting(self, model: str) -> int:
        """Requests in the model's queue."""
        (described,) = self.server.request("management", "GET", f"/models/{model}").json()
        return int(described["jobQueueStatus"]["pendingRequests"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    ledger = tmp_path_factory.mktemp("ledger") / "ledger"
    ledger.touch()
    config = f"batchSize: {BATCH}\nmaxBatchDelay: 100\nminWorkers: 1\nmaxWorkers: 1\n"
    # Only what hangs may meet a time-out, and nothing that a busy machine does slowly.
    hanging = config + "maxExecutions: 4\nresponseTimeout: 6\n"
    with ServerProcess(environment={"LEDGER": str(ledger)}, config={"metrics_mode": "prometheus"}) as server:
        archive(server.store, "once", HANDLER, config_yaml=config)
        archive(server.store, "again", HANDLER, config_yaml=config + "maxExecutions: 4\n")
        archive(server.store, "twice", HANDLER, config_yaml=config + "maxExecutions: 2\n")
        archive(server.store, "roomy", HANDLER, config_yaml=config + "maxExecutions: 4\n")
        archive(server.store, "hanging", HANDLER, config_yaml=hanging)
        for model in ("once", "again", "twice", "roomy", "hanging"):
            assert server.register(f"{model}.mar").status == 200
        yield Place(server, ledger)


def statuses(replies: list[http.Reply]) -> list[int]:
    return [reply.status for reply in replies]


@pytest.mark.parametrize(("bad", "status"), [("fails", 503), ("short", 503), ("crashes", 500), ("hangs", 500)])
def test_the_bad_request_alone_is_answered_with_an_error(place: Place, bad: str, status: int) -> None:
    model = "hanging" if bad == "hangs" else "again"
    replies, batches = place.batch(model, "a", "b", bad, "c", "d", "e", "f", "g")
    assert statuses(replies) == [200, 200, status, 200, 200, 200, 200, 200]
    assert [len(batch) for batch in batches if bad in batch] == [8, 4, 2, 1]
    assert max(Counter(name for batch in batches for name in batch).values()) <= 4
    eventually(lambda: f"{model} 1.0: a batch failed" in place.server.log(), within=20)


def test_two_bad_requests(place: Place) -> None:
    replies, batches = place.batch("again", "fails", "a", "b", "c", "d", "e", "f", "fails")
    assert statuses(replies) == [503, *[200] * 6, 503]
    assert max(map(len, batches)) == 8


@pytest.mark.parametrize("bad", ["fails", "crashes"])
def test_no_request_is_given_to_the_handler_more_often_than_it_allows(place: Place, bad: str) -> None:
    replies, batches = place.batch("twice", "a", "b", bad, "c", "d", "e", "f", "g")
    assert [len(batch) for batch in batches] == [8, 4, 4]
    # The bad one, and the three that shared its half.
    assert sorted(statuses(replies))[:4] == [200] * 4
    assert sorted(statuses(replies))[4:] == [statuses(replies)[2]] * 4


@pytest.mark.parametrize(("bad", "status"), [("fails", 503), ("crashes", 500)])
def test_without_a_word_of_the_handler_a_batch_runs_once(place: Place, bad: str, status: int) -> None:
    replies, batches = place.batch("once", "a", bad, "b", "c")
    assert statuses(replies) == [status] * 4
    assert len(batches) == 1


def test_a_batch_too_large_for_the_memory_is_halved_and_the_next_ones_are_smaller(place: Place) -> None:
    for first in (8, 2):
        replies, batches = place.batch("roomy", *["large"] * 8)
        assert statuses(replies) == [200] * 8
        assert len(batches[0]) == first
        assert len(batches[-1]) <= 2
    halved = 'wsgi_ts_batches_halved_total{model_name="roomy",model_version="1.0",} 2.0\n'
    eventually(lambda: halved in place.server.request("metrics", "GET", "/metrics").text, within=20)
